"""The causal separator `gtcrn`: its size, its causality, and streams that equal the whole."""

import numpy as np
import pytest
import torch
import yaml
from torch_complex.tensor import ComplexTensor

from cmkt.enhance.loading import Enhancer
from cmkt.enhance.streaming import StreamingEnhancer
from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import build_enhancement_model
from cmkt.espnet_plugin.frame_by_frame import MergedGRU
from cmkt.espnet_plugin.info import count_macs
from cmkt.espnet_plugin.separators.gtcrn import FrameNorm, GTCRNSeparator, split_bands

STFT = {"n_fft": 512, "hop_length": 256, "window": "hamming"}
CONFIG = {
    "encoder": "stft",
    "encoder_conf": STFT,
    "separator": "gtcrn",
    "separator_conf": {},
    "decoder": "stft",
    "decoder_conf": STFT,
    "model_conf": {"normalize_variance": False},
}


def roughen(module: torch.nn.Module) -> torch.nn.Module:
    """Give all normalisations statistics and scales as training would, and every one others."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, FrameNorm):
            for tensor in (part.running_mean, part.bias.data, part.weight.data):
                tensor.normal_(0, 0.5, generator=generator)
            part.running_var.uniform_(0.2, 3, generator=generator)
    return module.eval()


def separator(bins: int = 257, **settings) -> GTCRNSeparator:
    torch.manual_seed(0)
    return roughen(GTCRNSeparator(bins, **settings))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.cfloat)


def run(model, spectrum: torch.Tensor, lengths=None) -> torch.Tensor:
    lengths = torch.tensor(lengths or [spectrum.shape[1]] * len(spectrum))
    return model(spectrum, lengths)[0][0]


def test_it_is_as_small_as_published():
    model = GTCRNSeparator(257).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 23_669
    frames = 25
    macs = count_macs(lambda: run(model, noise(1, frames, 257)))["Global"] / frames  # of a frame
    assert 20e6 < macs * 16000 / 256 < 40e6


@pytest.mark.parametrize(
    "bins, rate", [(257, 16000), (201, 16000), (65, 16000), (129, 8000), (769, 48000)]
)
def test_bands_suit_any_spectrum(bins, rate):
    kept, triangles = split_bands(bins, rate)
    assert (bins, rate) != (257, 16000) or (kept, triangles.shape[1]) == (65, 64)
    # Every bin is interpolated, every band has a bin, and higher bands are no narrower.
    assert torch.allclose(triangles.sum(1), torch.ones(bins - kept))
    sizes = triangles.sum(0)
    assert sizes.min() > 0.5 and sizes[-4:].mean() > sizes[:4].mean()
    model = separator(bins, sample_rate=rate, channels=4)
    assert run(model, noise(2, 3, bins)).shape == (2, 3, bins)


def test_a_level_spectrum_keeps_its_level_in_bands_and_back():
    bands = separator().bands
    level = torch.full((257,), 3.0)
    assert torch.allclose(bands.split(bands.merge(level)), level)


def test_wrong_settings_are_told():
    for settings, word in (({"sample_rate": 4000}, "sample_rate"), ({"channels": 6}, "channels")):
        with pytest.raises(CmktError, match=word):
            GTCRNSeparator(257, **settings)
    with pytest.raises(CmktError, match="complex spectrum"):
        separator()(torch.randn(1, 4, 257), torch.tensor([4]))


def test_no_frame_depends_on_a_later_one():
    model, spectrum = separator(), noise(1, 20, 257)
    later = spectrum.clone()
    later[:, 12:] *= 100
    before, after = run(model, spectrum), run(model, later)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12], after[:, 12])


def test_every_frame_of_the_past_counts():
    spectrum = noise(1, 40, 257).requires_grad_()
    run(separator(), spectrum)[:, -1].abs().sum().backward()
    assert (spectrum.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 12, 10]], ids=["frames", "pieces"])
@torch.no_grad()
def test_a_stream_gives_what_the_whole_gives(pieces):
    model, spectrum, states, parts = separator(), noise(2, 30, 257), None, []
    for piece in spectrum.split(pieces, dim=1):
        (part,), states, others = model.forward_streaming(piece, states)
        parts.append(part)
        assert others["mask_spk1"].shape == piece.shape
    whole = run(model, spectrum)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()


@torch.no_grad()
def test_a_stream_passes_what_hangs_on_the_tap():
    model, spectrum = separator(), noise(1, 6, 257)
    plain = run(model, spectrum)
    model.tap.register_forward_hook(lambda _, inputs, output: output * 0.5)
    parts, states = [], None
    for piece in spectrum.split(1, dim=1):
        (part,), states, _ = model.forward_streaming(piece, states)
        parts.append(part)
    halved = run(model, spectrum)
    assert torch.allclose(torch.cat(parts, 1), halved, atol=1e-5)
    assert not torch.allclose(plain, halved, atol=1e-3)


@pytest.mark.parametrize("bidirectional", [True, False])
@torch.no_grad()
def test_merged_recurrences_are_those_side_by_side(bidirectional):
    torch.manual_seed(0)
    grus = [torch.nn.GRU(5, 3, batch_first=True, bidirectional=bidirectional) for _ in range(3)]
    merged, x = MergedGRU(grus), torch.randn(2, 8, 15)
    expected = torch.cat([gru(part)[0] for gru, part in zip(grus, x.chunk(3, -1), strict=True)], -1)
    assert torch.allclose(merged(x)[0], expected, atol=1e-6)


def test_padding_changes_no_valid_frame():
    model, spectrum = separator(), noise(2, 15, 257)
    spectrum[1, 9:] = 0
    together, alone = run(model, spectrum, [15, 9]), run(model, spectrum[1:, :9])
    assert torch.allclose(together[1, :9], alone[0], atol=1e-5)


def test_padding_enters_no_statistics_in_training():
    results = []
    for padding in (0.0, 1e3):
        model, spectrum = separator().train(), noise(2, 15, 257)
        spectrum[1, 9:] = padding
        output = run(model, spectrum, [15, 9])
        statistics = [p.running_var.clone() for p in model.modules() if isinstance(p, FrameNorm)]
        results.append([output[0], output[1, :9], *statistics])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_without_padding_the_normalisation_is_that_of_torch():
    torch.manual_seed(0)
    x, ours, stock = torch.randn(2, 4, 5, 6), FrameNorm(4), torch.nn.BatchNorm2d(4)
    assert torch.allclose(ours(x, torch.arange(10)), stock(x), atol=1e-6)
    assert torch.allclose(ours.running_var, stock.running_var)


def test_silence_is_finite_and_so_are_its_gradients():
    model = separator().train()
    spectrum = torch.zeros(2, 9, 257, dtype=torch.cfloat, requires_grad=True)
    output = run(model, spectrum, [9, 6])
    assert torch.equal(output, torch.zeros_like(output))
    (output.real + output.imag + 1).square().sum().backward()
    assert torch.isfinite(torch.view_as_real(spectrum.grad)).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_reach_every_parameter():
    model = separator().train()
    run(model, noise(2, 9, 257), [9, 6]).abs().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_both_kinds_of_complex_numbers_and_more_than_one_speaker():
    model, spectrum = separator(num_spk=2), noise(1, 4, 257)
    spectra, lengths, others = model(spectrum, torch.tensor([4]), None)
    assert len(spectra) == 2 and list(others) == ["mask_spk1", "mask_spk2"]
    assert torch.allclose(spectra[1], spectrum * others["mask_spk2"], atol=1e-6)
    pair = ComplexTensor(spectrum.real, spectrum.imag)
    other = model(pair, torch.tensor([4]), {})[0]
    assert torch.equal(other[1].real, spectra[1].real)


def test_it_learns():
    torch.manual_seed(0)
    model, clean = GTCRNSeparator(65, channels=8).train(), noise(2, 12, 65)
    clean[:, :, 20:] *= 0.1
    noisy = clean + 0.5 * noise(2, 12, 65, seed=1)
    optimiser, losses = torch.optim.Adam(model.parameters(), 0.01), []
    for _ in range(30):
        optimiser.zero_grad()
        losses.append((run(model, noisy) - clean).abs().mean())
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.6 * losses[0]


def export(folder, **changes):
    """Write what `cmkt export` writes of a model with random weights and statistics."""
    folder.mkdir()
    torch.manual_seed(0)
    model = roughen(build_enhancement_model({**CONFIG, **changes}))
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    (folder / "meta.yaml").write_text("sample_rate: 16000\n")
    torch.save(model.state_dict(), folder / "model.pth")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def stream(exported):
    return StreamingEnhancer(exported)


@pytest.mark.parametrize("length", [0, 1, 200, 257, 512, 4096, 5000, 5119])
def test_a_streamed_signal_is_the_one_enhanced_as_a_whole(exported, stream, length):
    signal = np.random.default_rng(0).normal(0, 0.1, length).astype(np.float32)
    whole = Enhancer(exported)(signal) if length else signal
    for sizes in ([length], [97] * (length // 97 + 1), [256] * (length // 256 + 1)):
        pieces = np.split(signal, np.cumsum(sizes)[:-1])
        streamed = np.concatenate([*map(stream.push, pieces), stream.flush()])
        assert streamed.shape == whole.shape
        assert np.allclose(streamed, whole, atol=1e-5)


def test_the_delay_is_one_window(stream):
    assert stream.latency / stream.sample_rate == 0.032
    given = returned = 0
    for piece in np.split(np.random.default_rng(0).normal(0, 0.1, 6000), range(50, 6000, 50)):
        given += len(piece)
        returned += len(stream.push(piece))
        assert given - returned <= stream.latency
    assert returned + len(stream.flush()) == given


def test_after_a_flush_or_reset_nothing_of_the_old_signal_is_left(stream):
    signal = np.random.default_rng(0).normal(0, 0.1, 1000)
    stream.push(10 * signal)
    stream.reset()
    first = np.concatenate([stream.push(signal), stream.flush()])
    assert np.array_equal(first, np.concatenate([stream.push(signal), stream.flush()]))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_conf": {"normalize_variance": True}}, "normalize_variance: false"),
        ({"separator": "rnn", "separator_conf": {"num_spk": 1, "unit": 8, "layer": 1}}, "another"),
        ({"separator": "transformer", "separator_conf":
            {"num_spk": 1, "adim": 8, "aheads": 2, "layers": 1, "linear_units": 8}}, "cannot"),
        ({"encoder": "conv", "encoder_conf": {"channel": 257, "kernel_size": 20, "stride": 10},
          "decoder": "conv", "decoder_conf": {"channel": 257, "kernel_size": 20, "stride": 10},
          "separator": "rnn", "separator_conf": {"num_spk": 1, "unit": 8, "layer": 1}}, "no STFT"),
    ],
    ids=["normalises", "looks ahead", "has no stream", "no spectrum"],
)  # fmt: skip
def test_what_cannot_stream_is_refused(tmp_path, changes, reason):
    with pytest.raises(CmktError, match=f"does not stream.*{reason}"):
        StreamingEnhancer(export(tmp_path / "export", **changes))


def test_a_causal_separator_of_espnet_streams_too(tmp_path):
    conf = {"num_spk": 1, "unit": 8, "layer": 1, "rnn_type": "lstm"}
    stream = StreamingEnhancer(export(tmp_path / "e", separator="rnn", separator_conf=conf))
    with pytest.raises(CmktError, match="finite"):
        stream.push(np.array([np.nan]))


@torch.no_grad()
def test_the_streaming_inference_of_espnet_gives_the_whole_too():
    """The calls of ESPnet's SeparateSpeechStreaming, on a signal of whole hops."""
    torch.manual_seed(0)
    model = roughen(build_enhancement_model(CONFIG))
    speech, lengths, states, chunks = torch.randn(1, 4096), torch.tensor([4096]), None, []
    for chunk in model.encoder.streaming_frame(speech):
        frame = model.encoder.forward_streaming(chunk)
        frames, states, _ = model.separator.forward_streaming(frame, states)
        chunks.append(model.decoder.forward_streaming(frames[0]))
    features, frame_lengths = model.encoder(speech, lengths)
    whole, _ = model.decoder(run(model.separator, features), lengths)
    assert torch.allclose(model.decoder.streaming_merge(chunks, lengths), whole, atol=1e-5)


@pytest.mark.parametrize("length", [4096, 4351])
def test_the_windows_give_an_untouched_signal_back(length):
    model, speech = build_enhancement_model(CONFIG), torch.randn(1, length)
    spectrum, _ = model.encoder(speech, torch.tensor([length]))
    back, _ = model.decoder(spectrum, torch.tensor([length]))
    assert torch.allclose(back, speech, atol=1e-5)
