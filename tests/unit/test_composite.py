"""Composite measures against a frame-by-frame implementation by definition, and by hand."""

import math

import numpy as np
import pytest
import scipy.linalg

from cmkt.cli import main
from cmkt.corpus.datadir import write_table
from cmkt.evaluate import composite as c
from cmkt.evaluate import metrics
from cmkt.evaluate.metrics import METRICS, MetricError

FS = 16000
COMPOSITES = ("csig", "cbak", "covl")


def voice(seed=0, seconds=2.0, fs=FS):
    """Return harmonics through moving resonances, with pauses and a noise floor of 16 bit."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * fs)) / fs
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.7 * time + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / fs
    formant = 900 + 500 * np.sin(2 * np.pi * 1.3 * time)
    samples = sum(
        np.sin(k * phase) * np.exp(-np.abs(k * pitch - formant) / 600) for k in range(1, 30)
    )
    samples *= np.clip(np.sin(2 * np.pi * 2 * time), 0, None)
    samples += 0.3 * generator.normal(size=len(time)) * np.clip(-np.sin(9 * time), 0, None)
    return np.round(0.1 * samples * 32767 + generator.normal(0, 3, len(time))) / 32768


def noise(seed=1, seconds=2.0):
    return 0.05 * np.random.default_rng(seed).normal(size=int(seconds * FS))


def frames_of(samples):
    size, hop = 480, 120
    window = [0.5 * (1 - math.cos(2 * math.pi * n / (size + 1))) for n in range(1, size + 1)]
    for start in range(0, (len(samples) - size) // hop * hop, hop):
        yield samples[start : start + size] * np.array(window)


def mean_of_best(values):
    return np.mean(sorted(values)[: round(0.95 * len(values))])


def naive_llr(clean, processed):
    def prediction(frame):
        lags = np.array([np.dot(frame[: 480 - k], frame[k:]) for k in range(17)])
        matrix = scipy.linalg.toeplitz(lags)
        return np.concatenate([[1], -np.linalg.solve(matrix[:16, :16], lags[1:])]), matrix

    values = []
    for x, y in zip(frames_of(clean), frames_of(processed), strict=True):
        (own, matrix), (other, _) = prediction(x), prediction(y)
        values.append(math.log((other @ matrix @ other) / (own @ matrix @ own)))
    return mean_of_best(values)


def naive_bands(frame):
    power = np.abs(np.fft.fft(frame, 1024))[:512] ** 2
    levels = []
    for centre, width in zip(c.CENTRES, c.BANDWIDTHS, strict=True):
        energy = 0.0
        for k in range(512):
            offset = (k - math.floor(centre / 8000 * 512)) / (width / 8000 * 512)
            weight = math.exp(-11 * offset**2 + math.log(70) - math.log(width))
            energy += power[k] * weight if weight > math.exp(-30 / (2 * 2.303)) else 0
        levels.append(10 * math.log10(max(energy, 1e-10)))
    weights = []
    for i in range(24):
        n = i
        if levels[i + 1] > levels[i]:
            while n < 24 and levels[n + 1] > levels[n]:
                n += 1
            peak = levels[n - 1]
        else:
            while n >= 0 and levels[n + 1] <= levels[n]:
                n -= 1
            peak = levels[n + 1]
        weights.append(20 / (20 + max(levels) - levels[i]) / (1 + peak - levels[i]))
    return np.diff(levels), np.array(weights)


def naive_wss(clean, processed):
    values = []
    for x, y in zip(frames_of(clean), frames_of(processed), strict=True):
        (slope_x, weight_x), (slope_y, weight_y) = naive_bands(x), naive_bands(y)
        weight = (weight_x + weight_y) / 2
        values.append(np.sum(weight * (slope_x - slope_y) ** 2) / np.sum(weight))
    return mean_of_best(values)


def test_parts_equal_the_definition_frame_by_frame():
    clean, seconds = voice(seconds=0.5), 0.5
    for gain in (0.05, 1.0):
        processed = 0.8 * clean + gain * noise(seconds=seconds)
        spectra = c.power_spectra(clean, FS), c.power_spectra(processed, FS)
        llr = c.log_likelihood_ratio(*spectra)
        assert llr == pytest.approx(naive_llr(clean, processed), rel=1e-4)
        wss = c.weighted_spectral_slope(*spectra, FS)
        assert wss == pytest.approx(naive_wss(clean, processed), rel=1e-9)


def test_ratings_are_the_published_regressions():
    clean = voice()
    processed = clean + 0.1 * noise()
    spectra = c.power_spectra(clean, FS), c.power_spectra(processed, FS)
    llr = c.log_likelihood_ratio(*spectra)
    wss = c.weighted_spectral_slope(*spectra, FS)
    snr = c.segmental_snr(clean, processed, FS)
    ratings = c.composite(clean, processed, FS, 2.0)
    for rating, expected in (
        (ratings.csig, 3.093 - 1.029 * llr + 0.603 * 2 - 0.009 * wss),
        (ratings.cbak, 1.634 + 0.478 * 2 - 0.007 * wss + 0.063 * snr),
        (ratings.covl, 1.594 + 0.805 * 2 - 0.512 * llr - 0.007 * wss),
    ):
        assert 1 < expected < 5, "choose another level of noise: nothing may be clipped here"
        assert rating == pytest.approx(expected)


def test_segmental_snr_by_hand():
    # A constant, and an error of a tenth of it: 20 dB in each frame. No error: 35 dB at most.
    clean = np.full(FS, 0.5)
    assert c.segmental_snr(clean, 1.1 * clean, FS) == pytest.approx(20)
    assert c.segmental_snr(clean, clean, FS) == 35
    assert c.segmental_snr(clean, 11 * clean, FS) == -10
    # Half of the frames are perfect; those across the border are few.
    processed = clean.copy()
    processed[FS // 2 :] *= 1.1
    assert c.segmental_snr(clean, processed, FS) == pytest.approx((35 + 20) / 2, abs=0.2)
    # The level of both does not matter.
    assert c.segmental_snr(0.1 * clean, 0.11 * clean, FS) == pytest.approx(20)


@pytest.mark.parametrize("fs", [8000, 16000, 48000])
def test_segmental_snr_is_defined_at_any_rate(fs):
    clean = voice(fs=fs)
    assert METRICS["segsnr"].function(clean, 1.1 * clean, fs) == pytest.approx(20, abs=0.1)


def test_perfect_speech_gets_the_best_ratings():
    clean = voice().astype(np.float32)
    assert [METRICS[name].function(clean, clean, FS) for name in COMPOSITES] == [5, 5, 5]
    spectra = c.power_spectra(clean, FS)
    assert c.log_likelihood_ratio(spectra, spectra) == 0
    assert c.weighted_spectral_slope(spectra, spectra, FS) == 0


def test_ratings_and_parts_get_worse_with_noise():
    clean = voice()
    parts, ratings = [], []
    for gain in (0.03, 0.1, 0.3):
        processed = clean + gain * noise()
        spectra = c.power_spectra(clean, FS), c.power_spectra(processed, FS)
        parts.append([
            c.log_likelihood_ratio(*spectra), c.weighted_spectral_slope(*spectra, FS)
        ])  # fmt: skip
        ratings.append([METRICS[name].function(clean, processed, FS) for name in COMPOSITES])
    assert (np.diff(parts, axis=0) > 0).all()
    assert (np.diff(ratings, axis=0) < 0).all()
    assert np.min(ratings) >= 1 and np.max(ratings) <= 5


def test_spectral_parts_ignore_the_level_of_the_output():
    clean = voice()
    processed = clean + 0.1 * noise()
    wanted, louder = (
        (c.log_likelihood_ratio(*pair), c.weighted_spectral_slope(*pair, FS))
        for pair in (
            (c.power_spectra(clean, FS), c.power_spectra(processed, FS)),
            (c.power_spectra(clean, FS), c.power_spectra(3 * processed, FS)),
        )
    )
    assert louder[0] == pytest.approx(wanted[0])
    # Only the floor of the energies knows the level.
    assert louder[1] == pytest.approx(wanted[1], rel=1e-3)


def test_digital_silence_and_band_limited_speech_stay_finite():
    clean = voice()
    clean[: FS // 2] = 0
    gated = np.where(np.abs(clean) < 0.02, 0, clean)
    gated[-FS // 4 :] = 0
    spectrum = np.fft.rfft(voice())
    spectrum[len(spectrum) // 4 :] = 0
    narrow = np.fft.irfft(spectrum)
    for reference, processed in ((clean, gated), (gated, clean), (narrow, clean), (clean, narrow)):
        ratings = c.composite(reference, processed, FS, 2.0)
        assert all(1 <= rating <= 5 for rating in (ratings.csig, ratings.cbak, ratings.covl))
        spectra = c.power_spectra(reference, FS), c.power_spectra(processed, FS)
        assert 0 <= c.log_likelihood_ratio(*spectra) < 30


def test_other_rates_are_converted():
    soxr = pytest.importorskip("soxr")
    clean = voice().astype(np.float32)
    processed = (clean + 0.1 * noise()).astype(np.float32)
    high = [soxr.resample(x, FS, 48000) for x in (clean, processed)]
    back = [soxr.resample(x, 48000, FS) for x in high]
    for name in COMPOSITES:
        assert METRICS[name].function(*high, 48000) == METRICS[name].function(*back, FS)


def test_pesq_is_computed_once_for_all_metrics_that_want_it():
    clean = voice(seed=3).astype(np.float32)
    processed = (clean + 0.1 * noise()).astype(np.float32)
    before = metrics._wideband_pesq.cache_info().misses
    scores = {n: METRICS[n].function(clean, processed, FS) for n in ("pesq", *COMPOSITES)}
    assert metrics._wideband_pesq.cache_info().misses == before + 1
    # A changed output in the same array is another one.
    processed += 0.3 * noise().astype(np.float32)
    assert METRICS["pesq"].function(clean, processed, FS) < scores["pesq"]
    assert METRICS["cbak"].function(clean, processed, FS) < scores["cbak"]


@pytest.mark.parametrize("name", [*COMPOSITES, "segsnr"])
def test_undefined_scores_are_named_failures(name):
    clean = voice().astype(np.float32)
    with pytest.raises(MetricError, match="silent|utterances"):
        METRICS[name].function(0 * clean, clean, FS)
    with pytest.raises(MetricError, match="shorter than|at least"):
        METRICS[name].function(clean[:500], clean[:500], FS)


def test_score_and_report_show_them(tmp_path, monkeypatch, capsys):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    for table, gain in (("spk1.scp", 0), ("wav.scp", 0.2)):
        for utterance in "ab":
            samples = voice(ord(utterance)) + gain * noise()
            soundfile.write(f"{utterance}_{table}.wav", samples, FS)
        write_table(table, {u: f"{u}_{table}.wav" for u in "ab"})
    wanted = ["pesq", "segsnr", *COMPOSITES]
    command = ["score", "--enhanced", "wav.scp", "--reference_dir", ".", "--nj", "1"]
    command += ["--output_dir", "exp/noisy/scores/test", "--metrics", ",".join(wanted)]
    assert main(command) == 0
    assert main(["report"]) == 0
    header = capsys.readouterr().out.splitlines()[1]
    for name in wanted:
        assert METRICS[name].label in header
        assert f"| {METRICS[name].label} |" in (tmp_path / "RESULTS.md").read_text()


def test_help_lists_every_metric(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in METRICS)
