"""Rooms: reverberant speech, and the reference that belongs to it."""

from pathlib import Path

import numpy as np

from cmkt.corpus.audio import read_audio
from cmkt.corpus.level import active_power

REFERENCES = ("early", "reverberant")
EARLY = 0.05  # seconds after the direct sound that still help intelligibility (ISO 3382-1)
ONSET = 0.002  # seconds kept before the direct sound


def read_impulse_response(path: str | Path, fs: int, channel: int = 0) -> np.ndarray:
    """Read a room impulse response from just before its direct sound.

    Args:
        path: the file, of any rate.
        fs: rate of the result in Hz.
        channel: which channel of a file that has several.

    Returns:
        (K,) samples that begin 2 ms before the strongest one, so speech is not delayed further.

    Raises:
        CmktError: as `read_audio`.
    """
    response, _ = read_audio(path, fs, channel)
    return response[max(int(np.abs(response).argmax()) - round(ONSET * fs), 0) :]


def reverberate(
    speech: np.ndarray, response: np.ndarray, fs: int, reference: str = "early"
) -> tuple[np.ndarray, np.ndarray]:
    """Put speech into a room.

    Args:
        speech: (N,) dry samples, not silent.
        response: (K,) from `read_impulse_response`.
        fs: sampling rate in Hz.
        reference: `early` (direct sound and the reflections of the first 50 ms, so that training
            removes the reverberation) or `reverberant` (all of it, so that it stays).

    Returns:
        the reverberant speech and its reference, each (N,), scaled by one factor so that the
        reference keeps the active level of the dry speech.
    """
    from scipy.signal import fftconvolve  # takes a second, and few mixtures are in rooms

    wet = fftconvolve(speech, response)[: len(speech)]
    target = wet
    if reference == "early":
        early = response[: round((ONSET + EARLY) * fs)]
        target = fftconvolve(speech, early)[: len(speech)]
    gain = np.sqrt(active_power(speech, fs) / max(active_power(target, fs), 1e-20))
    return wet * gain, target * gain
