"""What a training that mixes anew in each epoch reads: speech, noise and rooms at one rate.

A file that has the rate already, and one channel, is only listed; others are converted once.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cmkt.corpus.datadir import DataDirectory, write_table
from cmkt.corpus.level import is_silent
from cmkt.corpus.mixer import Item, Rooms, shard_path, write_wav
from cmkt.corpus.rooms import read_impulse_response
from cmkt.corpus.source import Source, refuse_unreadable
from cmkt.corpus.split import select
from cmkt.errors import CmktError
from cmkt.parallel import parallel_map


@dataclass(frozen=True)
class Converter:
    """Checks one file, and converts it if it has another rate or several channels.

    Args:
        work: folder that is being made.
        output_dir: the name that it gets.
        fs: sampling rate in Hz.
        channel: which channel of multi-channel files.
    """

    work: Path
    output_dir: Path
    fs: int
    channel: int

    def __call__(self, job: tuple[Source, str]) -> tuple[str, str, str]:
        """Return the name, the path at the right rate (empty if there is none), and why."""
        source, folder = job
        try:
            samples, rate = source.read(self.channel)
        except CmktError as error:
            return source.name, "", f"unreadable: {error}"
        if is_silent(samples, rate):
            return source.name, "", "silent"
        if rate == self.fs and not source.is_pipe and soundfile.info(source.value).channels == 1:
            return source.name, str(Path(source.value).absolute()), ""
        path = shard_path(folder, source.name.replace("/", "_"))
        if not (self.work / path).exists():
            samples = soxr.resample(samples, rate, self.fs) if rate != self.fs else samples
            write_wav(self.work / path, samples / max(np.abs(samples).max(), 1.0), self.fs)
        return source.name, str(self.output_dir / path), ""

    def room(self, job: tuple[str, Path]) -> tuple[str, str]:
        """Write an impulse response from its direct sound on; return its name and path."""
        name, file = job
        path = f"rir/{name.replace('/', '_')}.wav"
        response = read_impulse_response(file, self.fs)
        write_wav(self.work / path, 0.9 * response / np.abs(response).max(), self.fs)
        return name, str(self.output_dir / path)


def prepare_online(
    work: Path,
    output_dir: Path,
    data: DataDirectory,
    items: list[Item],
    noise: dict[str, Path],
    rooms: Rooms | None,
    fs: int,
    channel: int,
    nj: int,
) -> DataDirectory:
    """Write wav.scp and spk1.scp (both the clean speech), noise.scp, rir.scp and the other tables.

    Args:
        work: folder that is being made.
        output_dir: the name that it gets.
        data: the data directory that is read.
        items: its readable utterances.
        noise: {name: file}.
        rooms: impulse responses; None for none.
        fs: sampling rate in Hz.
        channel: which channel of multi-channel files.
        nj: parallel jobs.

    Returns:
        what is written.

    Raises:
        CmktError: more than 1 % unreadable, or nothing left.
    """
    convert = Converter(work, output_dir, fs, channel)
    sources = [Source(name, str(path), str(path), None) for name, path in noise.items()]
    skipped, paths = {}, {}
    for folder, group in (("audio", [item.source for item in items]), ("noise", sources)):
        (work / folder).mkdir(exist_ok=True)
        jobs = [(source, folder) for source in group]
        results = list(parallel_map(convert, jobs, nj, f"convert {folder}"))
        failed = {name: why for name, path, why in results if not path}
        unreadable = {name: why for name, why in failed.items() if why != "silent"}
        refuse_unreadable(unreadable, len(group), folder)
        paths[folder] = {name: path for name, path, _ in results if path}
        if not paths[folder]:
            raise CmktError(f"no {folder} left", output_dir, remedy="all of it is silent")
        skipped |= failed
    made = select(data, paths["audio"])
    made.wav, made.spk1 = paths["audio"], paths["audio"]
    made.extra["noise.scp"] = paths["noise"]
    if rooms:
        (work / "rir").mkdir(exist_ok=True)
        jobs = list(rooms.files.items())
        made.extra["rir.scp"] = dict(parallel_map(convert.room, jobs, nj, "convert rooms"))
    if skipped:
        write_table(work / "skipped", skipped)
    made.write(work)
    return made
