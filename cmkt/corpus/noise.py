"""Noise: which files there are, on which side of a split they lie, and a stretch of one of them.

A recording that is spread over several files (the channels of DEMAND, the clips of ESC-50) stays on
one side: `recording_of` knows how the published noise corpora name their files.
"""

import hashlib
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cmkt.corpus.audio import read_audio
from cmkt.corpus.datadir import read_table
from cmkt.corpus.split import split_groups
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
# How corpora name the files of one recording; the group is what the files have in common.
RECORDINGS = {
    "DEMAND": r"(?:^|.*/)([^/]+?)(?:_\d+k)?/ch\d\d\.\w+$",  # DKITCHEN/ch01.wav, of 16 channels
    "ESC-50": r"(?:^|.*/)\d-(\d+)-[A-Z]-\d+\.\w+$",  # fold-clip-take-class.wav
    "freesound": r".*_Freesound_validated_(\d+)_\d+\.\w+$",  # DNS-Challenge: name_..._id_part.wav
    "UrbanSound8K": r"(?:^|.*/)(\d+)-\d-\d+-\d+\.\w+$",  # clip-class-occurrence-slice.wav
    "OpenSLR 28": r".*(Room\d+)-\d+\.\w+$",  # impulse responses of one room
    "channels": r"(.+)[._-][Cc][Hh]\d+\.\w+$",  # CHiME: BGD_150203_010_CAF.CH1.wav
}


def recording_of(name: str) -> str:
    """Return the recording that a noise file was taken from.

    Args:
        name: path of the file relative to the noise folder, as in utt2noise.

    Returns:
        `<corpus>:<recording>` for the naming schemes of `RECORDINGS`, whatever the folder; for
        other files the name without its extension.
    """
    for corpus, pattern in RECORDINGS.items():
        match = re.match(pattern, name)
        if match:
            return f"{corpus}:{match[1]}"
    return str(Path(name).with_suffix(""))


def list_audio(
    source: str | Path, split: str | None = None, kind: str = "noise"
) -> dict[str, Path]:
    """List noise files, or impulse responses.

    With folders for train and test at the top of the tree, these are the split; validation
    takes its own folder or, if there is none, the training noise. Without them the hash of
    a recording's name decides: 70 % train, 10 % valid, 20 % test, the same on every machine.
    No recording (see `recording_of`) is ever on both sides. Of MUSAN only the noise is taken,
    not its music and speech.

    Args:
        source: a folder, searched to any depth for wav, flac and ogg, or a `wav.scp`.
        split: `train`, `valid` or `test`; None takes all.
        kind: what the files are, for messages.

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
                raise CmktError(f"{kind} from a pipe", source, number, "write it to a file")
    elif source.is_dir():
        files = {}
        for folder, _, names in os.walk(source, followlinks=True):
            for name in names:
                if name.lower().endswith(EXTENSIONS):
                    path = Path(folder, name)
                    # No blanks: the names are keys of noise.scp.
                    files["_".join(path.relative_to(source).as_posix().split())] = path
        files = _without_speech_and_music(files, source)
    else:
        raise CmktError(
            f"no such {kind} folder or wav.scp", source, remedy="want a tree of wav or flac"
        )
    if not files:
        raise CmktError(
            f"no {kind} files", source, remedy=f"it must hold {', '.join(EXTENSIONS)} at any depth"
        )
    if split is not None:
        sides = _sides(files, source)
        files = {name: path for name, path in files.items() if split in sides[name]}
        if not files:
            raise CmktError(
                f"no {kind} files for {split}", source, remedy="sort them into train/ and test/"
            )
    return dict(sorted(files.items()))


def _without_speech_and_music(files: dict[str, Path], source: Path) -> dict[str, Path]:
    kinds = ("music", "noise", "speech")
    if not all(any(f"/{kind}/" in f"/{name}" for name in files) for kind in kinds):
        return files
    kept = {name: path for name, path in files.items() if "/noise/" in f"/{name}"}
    logging.info("%s: MUSAN; music and speech are left out", source)
    return kept


def _sides(files: dict[str, Path], source: Path) -> dict[str, set[str]]:
    """Return the splits that may use each file."""
    top = {name: name.split("/") for name in files}
    while len({parts[0] for parts in top.values()}) == 1 and all(len(p) > 1 for p in top.values()):
        top = {name: parts[1:] for name, parts in top.items()}  # one folder holds all
    tops = {parts[0].lower() for parts in top.values() if len(parts) > 1}
    found = {side: tops.intersection(names) for side, names in SPLIT_FOLDERS.items()}
    if not (found["train"] and found["test"]):
        return _hashed_sides(files, source)
    side_of = {folder: {side} for side, folders in found.items() for folder in folders}
    if not found["valid"]:
        side_of.update({folder: {"train", "valid"} for folder in found["train"]})
    sides = {name: side_of.get(parts[0].lower(), set()) for name, parts in top.items()}
    outside = sum(not side for side in sides.values())
    if outside:
        logging.warning("%s: %d files lie in no folder of a split, unused", source, outside)
    shared = {recording_of(n) for n, s in sides.items() if "train" in s}
    shared &= {recording_of(name) for name, side in sides.items() if "test" in side}
    if shared:
        raise CmktError(
            f"recording {min(shared)} lies in the folder for train and in that for test",
            source,
            remedy="move all files of a recording to one side",
        )
    return sides


def _hashed_sides(files: dict[str, Path], source: Path) -> dict[str, set[str]]:
    recordings = {name: recording_of(name) for name in files}
    sides = {name: {_hash_side(recording)} for name, recording in recordings.items()}
    if set.union(*sides.values()) == set(SPLITS):
        return sides
    # Too few for a hash to reach every side: deal them out.
    try:
        dealt = split_groups(recordings, {"test": 0.2, "valid": 0.1, "train": 1})
    except CmktError as error:
        raise CmktError(
            f"too few noise recordings ({len(set(recordings.values()))}) to split",
            source,
            remedy="give more, or sort them into train/ and test/",
        ) from error
    return {name: {side} for side, names in dealt.items() for name in names}


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
