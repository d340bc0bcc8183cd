"""Simulate room impulse responses of shoebox rooms by the image method (pyroomacoustics).

Writes train/, valid/ and test/ with 70, 10 and 20 % of the rooms, 16-bit FLAC, one response a room,
for --rir_dir of `cmkt mix`. Sizes, absorption (from the reverberation time, by Sabine's formula)
and places are drawn uniformly; a room depends on --seed and its number alone.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from cmkt.errors import CmktError
from cmkt.parallel import parallel_map
from cmkt.stage import Stage, atomic_file

SIZES = ((3.0, 3.0, 2.4), (10.0, 8.0, 4.0))  # metres: smallest and largest length, width, height
WALL = 0.5  # metres between a wall and a talker or microphone
SHARES = (("train", 0.7), ("valid", 0.8), ("test", 1.0))  # cumulative


@dataclass(frozen=True)
class RoomPlan:
    """What rooms are drawn from.

    Args:
        reverberation: shortest and longest reverberation time (T60) in seconds.
        fs: sampling rate in Hz.
        seed: with the number of a room, all that it depends on.
    """

    reverberation: tuple[float, float]
    fs: int
    seed: int

    def simulate(self, number: int) -> np.ndarray:
        """Return the impulse response (K,) of one room, with a peak of 0.9."""
        import pyroomacoustics

        digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        while True:
            size = rng.uniform(*SIZES)
            time = rng.uniform(*self.reverberation)
            talker, microphone = rng.uniform(WALL, size - WALL, (2, 3))
            try:
                absorption, order = pyroomacoustics.inverse_sabine(time, size)
            except ValueError:  # no wall absorbs enough for so short a time in so large a room
                continue
            room = pyroomacoustics.ShoeBox(
                size,
                fs=self.fs,
                materials=pyroomacoustics.Material(absorption),
                max_order=min(order, 60),
            )
            room.add_source(talker)
            room.add_microphone(microphone)
            room.compute_rir()
            response = room.rir[0][0]
            return 0.9 * response / np.abs(response).max()


def _write(work: Path, plan: RoomPlan, total: int, number: int) -> None:
    side = next(name for name, share in SHARES if number < round(share * total))
    path = work / side / f"room{number:05d}.flac"
    if path.exists():
        return
    encoded = io.BytesIO()
    soundfile.write(encoded, plan.simulate(number), plan.fs, format="FLAC", subtype="PCM_16")
    with atomic_file(path, "wb") as stream:
        stream.write(encoded.getvalue())


def add_arguments(parser) -> None:
    """Add the options of `cmkt simulate-rooms`."""
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to make")
    parser.add_argument("--rooms", type=int, default=500, help="(default %(default)s)")
    parser.add_argument(
        "--reverberation",
        type=float,
        nargs=2,
        default=[0.2, 0.8],
        metavar=("SHORTEST", "LONGEST"),
        help="reverberation time T60 in seconds (default 0.2 0.8)",
    )
    parser.add_argument("--fs", type=int, default=16000, help="in Hz (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--nj", type=int, default=2, help="parallel jobs (default %(default)s)")


def run(args) -> None:
    """Run `cmkt simulate-rooms`."""
    shortest, longest = args.reverberation
    if args.rooms < 5 or args.nj < 1 or not 0.1 <= shortest <= longest <= 3:
        raise CmktError("want at least 5 rooms, and 0.1 <= SHORTEST <= LONGEST <= 3 seconds")
    try:
        import pyroomacoustics
    except ImportError as error:
        raise CmktError("no pyroomacoustics", remedy="pip install 'cmkt[rooms]'") from error
    plan = RoomPlan((shortest, longest), args.fs, args.seed)
    version = pyroomacoustics.__version__
    stage = Stage(args.output_dir, [], {"plan": repr(plan), "rooms": args.rooms, "by": version})
    if stage.is_done():
        return
    with stage.working_directory() as work:
        for side, _ in SHARES:
            (work / side).mkdir(exist_ok=True)
        write = partial(_write, work, plan, args.rooms)
        for _ in parallel_map(write, list(range(args.rooms)), args.nj, "simulate rooms"):
            pass
