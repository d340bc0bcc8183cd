"""Metrics against hand-computed values, their properties, and torchmetrics."""

import numpy as np
import pytest

from cmkt.evaluate.metrics import METRICS, MetricError, estoi, pesq, si_snr, snr, stoi

FS = 16000


def speech_like(seconds=2.0, seed=0, fs=FS):
    """Noise in bursts of four per second: enough like speech for PESQ and STOI."""
    time = np.arange(int(seconds * fs)) / fs
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (0.1 * noise * np.sin(2 * np.pi * 2 * time) ** 2).astype(np.float32)


def test_snr_and_si_snr_by_hand():
    reference = np.array([1.0, -1.0, 1.0, -1.0])
    orthogonal = np.array([1.0, 1.0, -1.0, -1.0])  # no correlation with the reference, no mean
    assert snr(reference, reference + 0.1 * orthogonal) == pytest.approx(20)
    assert si_snr(reference, reference + 0.1 * orthogonal) == pytest.approx(20)
    assert snr(reference, 2 * reference) == pytest.approx(0, abs=1e-9)


def test_si_snr_ignores_scale_and_offset_and_snr_does_not():
    reference = speech_like()
    enhanced = reference + 0.3 * speech_like(seed=1)
    assert si_snr(reference, 7 * enhanced + 0.5) == pytest.approx(
        si_snr(reference, enhanced), abs=1e-3
    )
    assert snr(reference, 7 * enhanced) < snr(reference, enhanced) - 10


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_ratios_equal_torchmetrics(scale):
    torch = pytest.importorskip("torch")
    audio = pytest.importorskip("torchmetrics.functional.audio")
    reference = speech_like().astype(np.float64)
    enhanced = 0.5 * reference + scale * speech_like(seed=1)
    preds, target = torch.from_numpy(enhanced), torch.from_numpy(reference)
    assert si_snr(reference, enhanced) == pytest.approx(
        float(audio.scale_invariant_signal_noise_ratio(preds, target)), abs=1e-6
    )
    assert snr(reference, enhanced) == pytest.approx(
        float(audio.signal_noise_ratio(preds, target)), abs=1e-6
    )


@pytest.mark.parametrize("name", METRICS)
def test_less_noise_scores_higher(name):
    clean, noise = speech_like(), 0.1 * speech_like(seed=1)
    metric = METRICS[name].function
    much, little, none = (metric(clean, clean + g * noise, FS) for g in (10, 1, 0))
    top = name in ("csig", "cbak", "covl") and little == 5  # these end at 5
    assert much < little and (little < none or top)
    assert np.isfinite(none)


def test_perfect_output_reaches_the_top_of_the_scale():
    clean = speech_like()
    assert pesq(clean, clean, FS) == pytest.approx(4.64, abs=0.01)
    assert stoi(clean, clean, FS) == pytest.approx(1, abs=1e-6)
    assert estoi(clean, clean, FS) == pytest.approx(1, abs=1e-6)


def test_pesq_of_another_rate_is_that_of_the_converted_audio():
    clean = speech_like(fs=48000)
    assert 1 < pesq(clean, clean + 0.2 * speech_like(seed=1, fs=48000), 48000) < 4.6


@pytest.mark.parametrize("name", METRICS)
def test_silent_reference_is_a_named_failure(name):
    clean = speech_like()
    with pytest.raises(MetricError):
        METRICS[name].function(0 * clean, clean, FS)


@pytest.mark.parametrize("name", ["pesq", "si_snr"])
def test_silent_output_is_a_named_failure(name):
    clean = speech_like()
    with pytest.raises(MetricError, match="output is silent"):
        METRICS[name].function(clean, 0 * clean, FS)


@pytest.mark.parametrize("name", ["pesq", "stoi", "estoi"])
def test_too_short_is_a_named_failure(name):
    clean = speech_like(0.2)
    with pytest.raises(MetricError):
        METRICS[name].function(clean, clean, FS)
