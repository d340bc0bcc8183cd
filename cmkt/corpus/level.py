"""Levels: active speech, silence, and adding noise at a signal-to-noise ratio."""

import numpy as np

PEAK = 0.99  # of full scale; mixtures stay below
FRAME = 0.02  # seconds
HANGOVER = 10  # frames: a pause counts as speech for 200 ms (ITU-T P.56)
MARGIN = 15.9  # dB: what lies further below the active level is a pause (ITU-T P.56)
SILENCE = 1e-4  # RMS of the loudest frame, of full scale
WEAK = 16 / 32768  # RMS below which 16-bit rounding would disturb the SNR


def frame_energies(samples: np.ndarray, fs: int) -> np.ndarray:
    """Return the energy of each 20-ms frame, (F,), of samples (N,); the last is zero-padded."""
    size = max(int(FRAME * fs), 1)
    padded = np.zeros(-(-len(samples) // size) * size)
    padded[: len(samples)] = samples
    return (padded.reshape(-1, size) ** 2).sum(axis=1)


def active_power(speech: np.ndarray, fs: int) -> float:
    """Return the mean power of speech where someone speaks.

    Follows ITU-T P.56: a frame is active if it, or one in the 200 ms before it, lies above a
    threshold 15.9 dB below the resulting active level. The threshold rises from the mean
    power to this fixed point.

    Args:
        speech: (N,) samples.
        fs: sampling rate in Hz.

    Returns:
        power, of full scale squared.
    """
    energies = frame_energies(speech, fs)
    size = max(int(FRAME * fs), 1)
    active = np.ones(len(energies), bool)
    while True:
        level = energies[active].mean()
        loud = energies > level * 10 ** (-MARGIN / 10)
        held = np.convolve(loud, np.ones(HANGOVER + 1))[: len(loud)] > 0.5
        held &= active
        if held.sum() in (0, active.sum()):
            return float(energies[active].sum() / min(active.sum() * size, len(speech)))
        active = held


def is_silent(samples: np.ndarray, fs: int) -> bool:
    """Tell whether even the loudest 20-ms frame of samples (N,) lies below -80 dBFS."""
    size = min(max(int(FRAME * fs), 1), len(samples))
    return bool(np.sqrt(frame_energies(samples, fs).max() / size) < SILENCE)


def mix_at_snr(
    speech: np.ndarray,
    noise: np.ndarray,
    snr: float,
    fs: int,
    reference: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Add noise to speech.

    Args:
        speech: (N,) samples, not silent.
        noise: (N,) samples, not silent.
        snr: active speech level over noise level, in dB.
        fs: sampling rate in Hz.
        reference: (N,) what training aims at, where it is not the speech: that with the early
            reflections only.

    Returns:
        the mixture and the reference, each (N,). Both are scaled by one factor, to a peak
        of 0.99, if the mixture would clip or its weaker part would drown in 16-bit rounding.
    """
    speech, noise = speech.astype(np.float64), noise.astype(np.float64)
    reference = speech if reference is None else reference
    speech_power = active_power(speech, fs)
    noise_power = speech_power / 10 ** (snr / 10)
    mixture = speech + noise * np.sqrt(noise_power / np.mean(noise**2))
    peak = max(np.abs(mixture).max(), np.abs(reference).max())
    weakest = np.sqrt(min(speech_power, noise_power))
    scale = PEAK / peak if peak > PEAK or weakest < WEAK else 1.0
    return mixture * scale, reference * scale
