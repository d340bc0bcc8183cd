"""Noise: which files there are, on which side of a split they lie, and a stretch of one of them."""

import hashlib
import logging
import math
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cmkt.corpus.audio import read_audio
from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError

EXTENSIONS = (".wav", ".flac", ".ogg")
SPLITS = ("train", "valid", "test")
# Top-level folder names that are taken for a split.
SPLIT_FOLDERS = {
    "train": ("train", "tr"),
    "valid": ("valid", "val", "dev", "cv"),
    "test": ("test", "tt"),
}
CROSSFADE = 0.05  # seconds


def list_noise(source: str | Path, split: str | None = None) -> dict[str, Path]:
    """List noise files.

    With folders for train and test at the top of the tree, these are the split; validation
    takes its own folder or, if there is none, the training noise. Without them the hash of
    a file's name decides: 70 % train, 10 % valid, 20 % test, the same on every machine.
    No file is ever on both sides.

    Args:
        source: a folder, searched to any depth for wav, flac and ogg, or a `wav.scp`.
        split: `train`, `valid` or `test`; None takes all.

    Returns:
        {name: file}, sorted by name: the path relative to `source`, or the id in the scp.

    Raises:
        CmktError: no such source, no audio in it, or none on that side of the split.
    """
    source = Path(source)
    if source.is_file():
        files = {name: Path(value) for name, value in read_table(source).items()}
        for number, path in enumerate(files.values(), 1):
            if str(path).endswith("|"):
                raise CmktError("noise from a pipe", source, number, "write it to a file")
    elif source.is_dir():
        files = {}
        for folder, _, names in os.walk(source, followlinks=True):
            for name in names:
                if name.lower().endswith(EXTENSIONS):
                    path = Path(folder, name)
                    files[path.relative_to(source).as_posix()] = path
    else:
        raise CmktError(
            "no such noise folder or wav.scp", source, remedy="give --noise_dir a tree of wav/flac"
        )
    if not files:
        raise CmktError(
            "no noise files", source, remedy=f"it must hold {', '.join(EXTENSIONS)} at any depth"
        )
    if split is not None:
        sides = _sides(files, source)
        files = {name: path for name, path in files.items() if split in sides[name]}
        if not files:
            raise CmktError(
                f"no noise files for {split}", source, remedy="sort them into train/ and test/"
            )
    return dict(sorted(files.items()))


def _sides(files: dict[str, Path], source: Path) -> dict[str, set[str]]:
    """Return the splits that may use each file."""
    tops = {name.split("/")[0].lower() for name in files if "/" in name}
    found = {side: tops.intersection(names) for side, names in SPLIT_FOLDERS.items()}
    if not (found["train"] and found["test"]):
        return {name: {_hash_side(name)} for name in files}
    side_of = {folder: {side} for side, folders in found.items() for folder in folders}
    if not found["valid"]:
        side_of.update({folder: {"train", "valid"} for folder in found["train"]})
    sides = {name: side_of.get(name.split("/")[0].lower(), set()) for name in files}
    outside = sum(not side for side in sides.values())
    if outside:
        logging.warning("%s: %d files lie in no folder of a split, unused", source, outside)
    return sides


def _hash_side(name: str) -> str:
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.7 else "valid" if share < 0.8 else "test"


def fit_length(noise: np.ndarray, length: int, fs: int, position: float) -> np.ndarray:
    """Crop noise, or loop it with an equal-power crossfade, to a length.

    Args:
        noise: (M,) samples, M >= 1.
        length: N, in samples.
        fs: sampling rate in Hz.
        position: in [0, 1): where to start, of the places there are.

    Returns:
        (N,) samples.
    """
    if len(noise) >= length:
        start = int(position * (len(noise) - length + 1))
        return noise[start : start + length]
    overlap = min(int(CROSSFADE * fs), len(noise) // 2)
    period = len(noise) - overlap
    cycle = noise[:period].copy()
    # The tail fades out under the head, so the last sample of the cycle runs into its first.
    angle = (np.arange(overlap) + 0.5) / max(overlap, 1) * (math.pi / 2)
    cycle[:overlap] = noise[:overlap] * np.sin(angle) + noise[period:] * np.cos(angle)
    return np.resize(np.roll(cycle, -int(position * period)), length)


def read_stretch(
    path: str | Path, length: int, fs: int, position: float, channel: int = 0
) -> np.ndarray:
    """Read a stretch of a noise file, of which only that is loaded if the file is longer.

    Args:
        path: the file.
        length: N, in samples at `fs`.
        fs: sampling rate of the result in Hz.
        position: in [0, 1): where to start, of the places there are.
        channel: which channel of a multi-channel file; a file with one has only that.

    Returns:
        (N,) float32 samples.

    Raises:
        CmktError: as `read_audio`.
    """
    header = soundfile.info(str(path))
    channel = channel if header.channels > 1 else 0
    needed = math.ceil(length * header.samplerate / fs) + 1
    if header.frames <= needed:
        return fit_length(read_audio(path, fs, channel)[0], length, fs, position)
    start = int(position * (header.frames - needed + 1))
    try:
        audio, rate = soundfile.read(
            str(path), needed, start, dtype="float32", always_2d=True, fill_value=None
        )
    except soundfile.LibsndfileError as error:
        raise CmktError(f"not readable as audio: {error}", path, remedy="remove it") from error
    if len(audio) < needed or channel >= audio.shape[1] or not np.isfinite(audio).all():
        raise CmktError(
            f"truncated, not finite or without channel {channel}", path, remedy="remove the file"
        )
    stretch = np.ascontiguousarray(audio[:, channel])
    if rate != fs:
        stretch = soxr.resample(stretch, rate, fs).astype(np.float32)
    return stretch[:length]
