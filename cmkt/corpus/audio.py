"""Reading audio files with errors that name the file."""

from pathlib import Path

import numpy as np
import soundfile
import soxr

from cmkt.errors import CmktError


def read_audio(path: str | Path, fs: int | None = None, channel: int = 0) -> tuple[np.ndarray, int]:
    """Read one channel of an audio file.

    Args:
        path: any format that libsndfile reads (wav, flac, ogg, ...).
        fs: sampling rate to convert to with soxr, in Hz; None keeps the file's.
        channel: which channel of a multi-channel file, counted from 0.

    Returns:
        samples (N,) as float32 in [-1, 1], and their rate in Hz.

    Raises:
        CmktError: missing, empty, truncated or not audio.
    """
    path = Path(path)
    if not path.exists():
        raise CmktError("no such audio file", path)
    try:
        audio, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise CmktError(
            f"not readable as audio: {error}", path, remedy="replace the file or drop its line"
        ) from error
    if len(audio) == 0:
        raise CmktError("empty audio file", path, remedy="replace the file or drop its line")
    if channel >= audio.shape[1]:
        raise CmktError(f"has {audio.shape[1]} channels, not channel {channel}", path)
    samples = np.ascontiguousarray(audio[:, channel])
    if not np.isfinite(samples).all():
        raise CmktError("holds samples that are not finite", path, remedy="replace the file")
    if fs is not None and fs != rate:
        samples, rate = soxr.resample(samples, rate, fs).astype(np.float32), fs
    return samples, rate
