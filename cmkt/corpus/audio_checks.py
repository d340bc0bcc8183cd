"""Decodes an audio file once and measures what `cmkt validate` must know of it."""

import hashlib
import os
from typing import NamedTuple

import numpy as np
import soundfile

from cmkt.corpus.level import FRAME, SILENCE, is_silent
from cmkt.corpus.source import Source
from cmkt.errors import CmktError

FULL_SCALE = 32767
RUN = 3  # samples at full scale in a row count as clipped


class Audio(NamedTuple):
    """What was found out about one file.

    Args:
        error: why it cannot be read; empty if it can.
        rate: sampling rate in Hz.
        channels: their number.
        samples: of one channel.
        digest: hash of the samples as 16-bit integers, whatever the container.
        clipped: share of the samples that are clipped.
        offset: mean, of full scale.
        silent: whether even the loudest 20 ms lie below -80 dBFS.
    """

    error: str
    rate: int = 0
    channels: int = 0
    samples: int = 0
    digest: str = ""
    clipped: float = 0.0
    offset: float = 0.0
    silent: bool = False


class Job(NamedTuple):
    """Files of one utterance (input, and reference if there is one), and their state on disk."""

    utterance: str
    paths: tuple[str, ...]
    state: str


def make_job(utterance: str, paths: tuple[str, ...]) -> Job:
    """Note paths, sizes and times of change: a result holds while these are the same."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            state = (status.st_size, status.st_mtime_ns)
        except OSError:  # a pipe, or missing
            state = None
        digest.update(f"{path}\0{state}\0".encode())
    return Job(utterance, paths, digest.hexdigest()[:16])


def examine(job: Job) -> dict:
    """Measure the files of a job; return a JSON-like result for a journal."""
    audio = [list(measure(path)) for path in job.paths]
    return {"utterance": job.utterance, "state": job.state, "audio": audio}


def measure(value: str) -> Audio:
    """Decode one entry of an scp and measure it.

    Args:
        value: path, or a command whose output is the audio.
    """
    source = Source(value, value, value, None)
    try:
        source.check()
        samples, rate = _decode(source)  # (C, N)
    except CmktError as error:
        return Audio(str(error).removeprefix(str(source.error(""))))
    flat = samples.reshape(-1)  # one channel after the other
    peak = max(int(flat.max()), -int(flat.min()))
    return Audio(
        "",
        rate,
        samples.shape[0],
        samples.shape[1],
        hashlib.blake2b(flat, digest_size=12).hexdigest(),
        _clipped_share(flat) if peak >= FULL_SCALE else 0.0,
        round(float(flat.mean(dtype=np.float64)) / 32768, 6),
        _is_silent(flat, peak, rate),
    )


def _decode(source: Source) -> tuple[np.ndarray, int]:
    """Return samples (C, N) as int16, and the rate in Hz."""
    if source.is_pipe:
        samples, rate = source.read(0)
        return _to_int16(samples)[None], rate
    try:
        with soundfile.SoundFile(source.value) as stream:
            # Compressed and floating-point audio may exceed full scale, which int16 would wrap.
            exact = stream.subtype.startswith("PCM")
            expected, rate = stream.frames, stream.samplerate
            # The number is given because files that cannot seek (GSM 6.10) want it.
            kind = "int16" if exact else "float32"
            samples = stream.read(expected, dtype=kind, always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise source.error(f"not readable to its end: {error}") from error
    if len(samples) < expected:
        raise source.error(f"not readable to its end: {len(samples)} of {expected} samples")
    samples = np.ascontiguousarray(samples.T)
    return samples if exact else _to_int16(samples), rate


def _to_int16(samples: np.ndarray) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise CmktError("holds samples that are not finite")
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)


def _clipped_share(samples: np.ndarray) -> float:
    """Return the share of samples (N,) at full scale in runs of at least `RUN`."""
    full = np.flatnonzero((samples >= FULL_SCALE) | (samples <= -FULL_SCALE))
    starts = np.flatnonzero(np.diff(full, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(full))
    return round(float(lengths[lengths >= RUN].sum() / len(samples)), 6)


def _is_silent(samples: np.ndarray, peak: int, rate: int) -> bool:
    # A frame is as loud as its peak alone makes it: measure only what is hardly louder.
    if peak > SILENCE * 32768 * np.sqrt(max(FRAME * rate, 1)):
        return False
    return is_silent(samples / 32768, rate)
