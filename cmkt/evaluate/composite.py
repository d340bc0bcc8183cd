"""Composite measures CSIG, CBAK and COVL, and what they are made of.

Hu and Loizou, "Evaluation of objective quality measures for speech enhancement", IEEE Transactions
on Audio, Speech and Language Processing 16(1), 2008: regressions of listeners' ratings on the
log-likelihood ratio (LLR), the weighted spectral slope (WSS), the segmental SNR and PESQ. As is
usual for VoiceBank-DEMAND the PESQ is wide-band, at 16 kHz. Frames and constants are those of the
authors' MATLAB code, with which published numbers were made; where it departs from the definition
a comment says so.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

FRAME = 0.03  # seconds; a new frame starts every quarter of it
SNR_LIMITS = (-10.0, 35.0)  # dB, of each frame in the segmental SNR
BEST = 0.95  # share of the frames, the best ones, that LLR and WSS are means of
LPC_ORDER = 16  # at 16 kHz
# Relative to the energy of a frame: keeps the prediction error of band-limited speech above the
# rounding errors, far below the noise floor of 16-bit audio.
WHITE_NOISE = 1e-12
EPSILON = np.finfo(np.float64).eps

# Critical bands of the WSS in Hz: centres and bandwidths.
CENTRES = np.array([
    50, 120, 190, 260, 330, 400, 470, 540, 617.372, 703.378, 798.717, 904.128, 1020.38, 1148.30,
    1288.72, 1442.54, 1610.70, 1794.16, 1993.93, 2211.08, 2446.71, 2701.97, 2978.04, 3276.17,
    3597.63,
])  # fmt: skip
BANDWIDTHS = np.array([
    70, 70, 70, 70, 70, 70, 70, 77.3724, 86.0056, 95.3398, 105.411, 116.256, 127.914, 140.423,
    153.823, 168.154, 183.457, 199.776, 217.153, 235.631, 255.255, 276.072, 298.126, 321.465,
    346.136,
])  # fmt: skip
FILTER_FLOOR = np.exp(-30 / (2 * 2.303))  # lower weights count as 0
ENERGY_FLOOR = 1e-10  # of full scale squared
GLOBAL_PEAK, LOCAL_PEAK = 20, 1  # dB; Klatt 1982


@dataclass(frozen=True)
class Composite:
    """Predicted ratings from 1 to 5: of the speech, of the background, and overall."""

    csig: float
    cbak: float
    covl: float


def composite(reference: np.ndarray, enhanced: np.ndarray, fs: int, pesq: float) -> Composite:
    """Predict the ratings of listeners (Hu and Loizou 2008, table VII).

    Args:
        reference: clean speech (N,), of full scale 1.
        enhanced: processed speech (N,).
        fs: sampling rate in Hz; the regression is used at 16 kHz.
        pesq: wide-band PESQ of the two (ITU-T P.862.2).

    Raises:
        ValueError: too short, or the reference is silent.
    """
    spectra = power_spectra(reference, fs), power_spectra(enhanced, fs)
    llr, wss = log_likelihood_ratio(*spectra), weighted_spectral_slope(*spectra, fs)
    snr = segmental_snr(reference, enhanced, fs)
    ratings = (
        3.093 - 1.029 * llr + 0.603 * pesq - 0.009 * wss,
        1.634 + 0.478 * pesq - 0.007 * wss + 0.063 * snr,
        1.594 + 0.805 * pesq - 0.512 * llr - 0.007 * wss,
    )
    return Composite(*(min(max(float(rating), 1.0), 5.0) for rating in ratings))


def _frames(samples: np.ndarray, fs: int) -> np.ndarray:
    """Cut samples (N,) into windowed frames (F, L)."""
    size = round(FRAME * fs)
    hop = size // 4
    count = (len(samples) - size) // hop  # the authors' count: one less than fit
    if count < 1:
        raise ValueError(f"shorter than {1.25 * FRAME} s")
    frames = sliding_window_view(np.asarray(samples, np.float64), size)[: count * hop : hop]
    return frames * np.hanning(size + 2)[1:-1]


def segmental_snr(reference: np.ndarray, enhanced: np.ndarray, fs: int) -> float:
    """Mean SNR of the frames in dB, each limited to -10 to 35 dB.

    Args:
        reference: clean speech (N,), of full scale 1.
        enhanced: processed speech (N,).
        fs: sampling rate in Hz.

    Raises:
        ValueError: too short.
    """
    clean, processed = _frames(reference, fs), _frames(enhanced, fs)
    signal, noise = np.sum(clean**2, axis=1), np.sum((clean - processed) ** 2, axis=1)
    snrs = 10 * np.log10(signal / (noise + EPSILON) + EPSILON)  # (F,)
    return float(np.clip(snrs, *SNR_LIMITS).mean())


def power_spectra(samples: np.ndarray, fs: int) -> np.ndarray:
    """Return power spectra (F, K / 2 + 1) of the frames of samples (N,).

    The transform is at least twice as long as a frame, so its inverse has all autocorrelations.
    """
    frames = _frames(samples, fs)
    size = 2 ** int(np.ceil(np.log2(2 * frames.shape[1])))
    return np.abs(np.fft.rfft(frames, size)) ** 2


def _mean_of_best(distances: np.ndarray) -> float:
    return float(np.sort(distances)[: max(round(BEST * len(distances)), 1)].mean())


def log_likelihood_ratio(clean: np.ndarray, processed: np.ndarray) -> float:
    """Mean log-likelihood ratio of the best 95 % of the frames, at least 0.

    log((a_p R a_p) / (a_c R a_c)): how much worse the linear prediction of the processed frame
    predicts the clean one than its own. Frames in which the reference is digital silence have
    no prediction and are left out.

    Args:
        clean: power spectra (F, K / 2 + 1) of the reference (see `power_spectra`).
        processed: those of the processed speech.

    Raises:
        ValueError: the reference is silent.
    """
    r_clean, r_processed = (
        np.fft.irfft(spectra, axis=1)[:, : LPC_ORDER + 1] for spectra in (clean, processed)
    )  # (F, P + 1)
    heard = r_clean[:, 0] > 0
    if not heard.any():
        raise ValueError("the reference is silent")
    r_clean, r_processed = r_clean[heard], r_processed[heard]
    # Levels do not matter, and without them nothing underflows.
    r_clean /= r_clean[:, :1]
    r_clean[:, 0] += WHITE_NOISE
    silent = r_processed[:, 0] <= 0
    r_processed[silent, 0] = 1  # predicts nothing
    r_processed /= r_processed[:, :1]
    r_processed[:, 0] += WHITE_NOISE
    lags = np.abs(np.subtract.outer(np.arange(LPC_ORDER + 1), np.arange(LPC_ORDER + 1)))
    matrices = r_clean[:, lags]  # (F, P + 1, P + 1)
    own, other = (
        np.einsum("fi,fij,fj->f", a, matrices, a, optimize=True)
        for a in (_prediction(r_clean), _prediction(r_processed))
    )
    return _mean_of_best(np.log(np.maximum(other, own) / own))


def _prediction(autocorrelation: np.ndarray) -> np.ndarray:
    """Return the prediction-error filters (F, P + 1) of autocorrelations: Levinson-Durbin."""
    filters = np.zeros_like(autocorrelation)
    filters[:, 0] = 1
    error = autocorrelation[:, 0].copy()
    for order in range(1, autocorrelation.shape[1]):
        sums = np.sum(filters[:, :order] * autocorrelation[:, order:0:-1], axis=1)
        reflection = (-sums / error)[:, None]
        filters[:, 1 : order + 1] += reflection * filters[:, order - 1 :: -1][:, :order]
        error *= 1 - reflection[:, 0] ** 2
    return filters


def weighted_spectral_slope(clean: np.ndarray, processed: np.ndarray, fs: int) -> float:
    """Mean weighted spectral-slope distance of the best 95 % of the frames (Klatt 1982).

    The squared difference of the slopes of the critical-band spectra in dB, weighted towards
    the bands near spectral peaks.

    Args:
        clean: power spectra (F, K / 2 + 1) of the reference (see `power_spectra`).
        processed: those of the processed speech.
        fs: sampling rate in Hz.
    """
    bins = clean.shape[1] - 1
    per_hertz = bins / (fs / 2)
    offsets = np.arange(bins) - np.floor(CENTRES * per_hertz)[:, None]  # (B, K / 2)
    filters = np.exp(-11 * (offsets / (BANDWIDTHS * per_hertz)[:, None]) ** 2)
    filters *= (BANDWIDTHS[0] / BANDWIDTHS)[:, None]
    filters[filters <= FILTER_FLOOR] = 0
    slopes, weights = zip(
        *(_slopes_and_weights(spectra[:, :-1] @ filters.T) for spectra in (clean, processed)),
        strict=True,
    )
    weight = (weights[0] + weights[1]) / 2  # (F, B - 1)
    distances = np.sum(weight * (slopes[0] - slopes[1]) ** 2, axis=1) / np.sum(weight, axis=1)
    return _mean_of_best(distances)


def _slopes_and_weights(energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return slopes in dB and Klatt's weights, each (F, B - 1), of band energies (F, B)."""
    levels = 10 * np.log10(np.maximum(energies, ENERGY_FLOOR))
    slopes = np.diff(levels, axis=1)
    rising, band = slopes > 0, np.arange(slopes.shape[1])
    # Where the rise ends to the right of each band, and where the fall began to its left.
    end = np.where(rising, slopes.shape[1], band)[:, ::-1]
    end = np.minimum.accumulate(end, axis=1)[:, ::-1]
    start = np.maximum.accumulate(np.where(rising, band, -1), axis=1)
    # The peak to the right is levels[end]; the authors' code takes the band below it.
    peaks = np.take_along_axis(levels, np.where(rising, end - 1, start + 1), axis=1)
    lower = levels[:, :-1]
    to_global = GLOBAL_PEAK / (GLOBAL_PEAK + levels.max(axis=1, keepdims=True) - lower)
    return slopes, to_global * LOCAL_PEAK / (LOCAL_PEAK + peaks - lower)
