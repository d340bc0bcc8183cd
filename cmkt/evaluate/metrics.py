"""The metrics of `cmkt score`, each of one utterance.

SI-SNR and SNR are written out here because torchmetrics imports `transformers`, which scoring
must run without; a test holds them against torchmetrics.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr

from cmkt.evaluate.composite import Composite, composite, segmental_snr

PESQ_RATE = 16000


class MetricError(ValueError):
    """A metric that is not defined for this utterance; the message says why."""


def pesq(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> float:
    """Wide-band perceptual evaluation of speech quality (ITU-T P.862.2), MOS-LQO, 1.04 to 4.64.

    Args:
        reference: clean speech (N,).
        enhanced: processed speech (N,).
        fs: sampling rate in Hz; other rates than 16 kHz are converted to it first.

    Raises:
        MetricError: no speech found, shorter than a quarter of a second, or silent output.
    """
    return _wideband_pesq(*_at_pesq_rate(reference, enhanced, fs))


def _at_pesq_rate(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> tuple[bytes, bytes]:
    pair = (np.asarray(x, np.float32) for x in (reference, enhanced))
    if fs != PESQ_RATE:
        pair = (soxr.resample(x, fs, PESQ_RATE) for x in pair)
    return tuple(x.tobytes() for x in pair)


# PESQ takes most of the time, and four metrics of an utterance want it: the last one is kept. Bytes
# stand for the arrays because they can be compared.
@lru_cache(maxsize=1)
def _wideband_pesq(reference: bytes, enhanced: bytes) -> float:
    from pesq import PesqError
    from pesq import pesq as itu_pesq

    reference, enhanced = (np.frombuffer(x, np.float32) for x in (reference, enhanced))
    if not np.any(enhanced):  # the library fails on it with an unrelated message
        raise MetricError("PESQ: the output is silent")
    try:
        return float(itu_pesq(PESQ_RATE, reference, enhanced, "wb"))
    except (PesqError, ValueError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        reason = reason.decode() if isinstance(reason, bytes) else reason
        raise MetricError(f"PESQ: {reason}") from error


def stoi(reference: np.ndarray, enhanced: np.ndarray, fs: int, extended: bool = False) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), at most 1.

    Args:
        reference: clean speech (N,).
        enhanced: processed speech (N,).
        fs: sampling rate in Hz.
        extended: the extended form (Jensen and Taal 2016).

    Raises:
        MetricError: silent reference, or less than about 0.4 s of active speech.
    """
    from pystoi import stoi as pystoi_stoi

    name = "ESTOI" if extended else "STOI"
    if not np.any(reference):
        raise MetricError(f"{name}: the reference is silent")
    with warnings.catch_warnings():
        # On too little speech pystoi warns and returns 1e-5, which is no score.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi_stoi(reference, enhanced, fs, extended=extended))
        except RuntimeWarning as error:
            raise MetricError(f"{name}: too little active speech in the reference") from error


def estoi(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> float:
    """Extended short-time objective intelligibility; see `stoi`."""
    return stoi(reference, enhanced, fs, extended=True)


def _decibels(signal: np.ndarray, noise: np.ndarray) -> float:
    # The same guard as torchmetrics: a perfect output scores high but finite.
    tiny = np.finfo(np.float64).eps
    return float(10 * np.log10((np.sum(signal**2) + tiny) / (np.sum(noise**2) + tiny)))


def si_snr(reference: np.ndarray, enhanced: np.ndarray, fs: int = 0) -> float:
    """Scale-invariant signal-to-noise ratio in dB (Le Roux et al. 2019, with the mean removed).

    Args:
        reference: clean speech (N,).
        enhanced: processed speech (N,).
        fs: not used; the ratio does not depend on it.

    Raises:
        MetricError: reference or output is silent, where the ratio is not defined.
    """
    reference, enhanced = (
        x.astype(np.float64) - x.mean(dtype=np.float64) for x in (reference, enhanced)
    )
    for name, signal in (("reference", reference), ("output", enhanced)):
        if not np.any(signal):
            raise MetricError(f"SI-SNR: the {name} is silent")
    target = np.dot(enhanced, reference) / np.dot(reference, reference) * reference
    return _decibels(target, enhanced - target)


def snr(reference: np.ndarray, enhanced: np.ndarray, fs: int = 0) -> float:
    """Signal-to-noise ratio in dB, every difference to the reference being noise.

    Args:
        reference: clean speech (N,).
        enhanced: processed speech (N,).
        fs: not used; the ratio does not depend on it.

    Raises:
        MetricError: the reference is silent.
    """
    reference, enhanced = reference.astype(np.float64), enhanced.astype(np.float64)
    if not np.any(reference):
        raise MetricError("SNR: the reference is silent")
    return _decibels(reference, reference - enhanced)


def segsnr(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> float:
    """Segmental signal-to-noise ratio in dB; see `cmkt.evaluate.composite.segmental_snr`.

    Raises:
        MetricError: the reference is silent or too short.
    """
    if not np.any(reference):
        raise MetricError("segmental SNR: the reference is silent")
    try:
        return segmental_snr(reference, enhanced, fs)
    except ValueError as error:
        raise MetricError(f"segmental SNR: {error}") from error


@lru_cache(maxsize=1)
def _composite(reference: bytes, enhanced: bytes) -> Composite:
    quality = _wideband_pesq(reference, enhanced)
    reference, enhanced = (np.frombuffer(x, np.float32) for x in (reference, enhanced))
    return composite(reference, enhanced, PESQ_RATE, quality)


def csig(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> float:
    """Predicted rating of the speech itself, 1 to 5 (Hu and Loizou 2008), at 16 kHz.

    Args:
        reference: clean speech (N,).
        enhanced: processed speech (N,).
        fs: sampling rate in Hz; other rates than 16 kHz are converted to it first.

    Raises:
        MetricError: where PESQ is not defined.
    """
    return _composite(*_at_pesq_rate(reference, enhanced, fs)).csig


def cbak(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> float:
    """Predicted rating of the background, 1 (intrusive) to 5 (not noticed); see `csig`."""
    return _composite(*_at_pesq_rate(reference, enhanced, fs)).cbak


def covl(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> float:
    """Predicted rating of the overall quality, 1 to 5; see `csig`."""
    return _composite(*_at_pesq_rate(reference, enhanced, fs)).covl


@dataclass(frozen=True)
class Metric:
    """How a metric is computed and shown; for all of them higher is better.

    Args:
        label: its name in tables, with its unit.
        decimals: digits after the point in tables.
        function: (reference (N,), enhanced (N,), fs in Hz) -> value.
    """

    label: str
    decimals: int
    function: Callable[[np.ndarray, np.ndarray, int], float]


METRICS = {
    "pesq": Metric("PESQ", 2, pesq),
    "stoi": Metric("STOI", 3, stoi),
    "estoi": Metric("ESTOI", 3, estoi),
    "si_snr": Metric("SI-SNR (dB)", 2, si_snr),
    "snr": Metric("SNR (dB)", 2, snr),
    "segsnr": Metric("segSNR (dB)", 2, segsnr),
    "csig": Metric("CSIG", 2, csig),
    "cbak": Metric("CBAK", 2, cbak),
    "covl": Metric("COVL", 2, covl),
}
