"""The backbones of the lineage: any length, padding and silence harm nothing, all of it learns."""

import copy
import math

import pytest
import torch
from espnet2.enh.decoder.stft_decoder import STFTDecoder
from espnet2.enh.encoder.stft_encoder import STFTEncoder
from torch_complex.tensor import ComplexTensor

from cmkt.errors import CmktError
from cmkt.espnet_plugin.recurrent import run_layer_by_layer
from cmkt.espnet_plugin.separators.blstm_sum import BLSTMSumSeparator
from cmkt.espnet_plugin.separators.dense_dual_path import DenseDualPathSeparator

FREQUENCIES = 33
SMALL = {"channels": 8, "layers": 2, "heads": 2, "dense_depth": 2, "unit": 5}
BUILDERS = {
    "mask": lambda size: BLSTMSumSeparator(size, unit=12),
    "mapping": lambda size: BLSTMSumSeparator(size, layer=3, unit=12, mapping=True),
    "dual_path": lambda size: DenseDualPathSeparator(size, **SMALL),
}


@pytest.fixture(params=BUILDERS)
def build(request):
    """Return a function that builds a small separator, always from the same weights."""

    def builder(size=FREQUENCIES):
        torch.manual_seed(0)
        return BUILDERS[request.param](size)

    return builder


def spectrum(batch=2, frames=12, frequencies=FREQUENCIES):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, frequencies, dtype=torch.complex64, generator=generator)


def difference(a, b):
    """Return the largest difference of two spectra, of torch or of torch_complex."""
    return max((a.real - b.real).abs().max().item(), (a.imag - b.imag).abs().max().item())


@pytest.mark.parametrize("n_fft, hop, samples", [(64, 16, 1001), (50, 20, 999), (62, 31, 200)])
def test_waveforms_of_any_length_keep_it(build, n_fft, hop, samples):
    """Odd and even numbers of frequencies, down to a few frames."""
    conf = {"n_fft": n_fft, "hop_length": hop, "window": "hamming"}
    encoder, decoder = STFTEncoder(**conf), STFTDecoder(**conf)
    separator = build(encoder.output_dim)
    assert separator.num_spk == 1
    lengths = torch.tensor([samples, samples - 77])
    features, frames = encoder(torch.randn(2, samples), lengths)
    enhanced, found, others = separator(features, frames, None)
    assert len(enhanced) == 1 and torch.equal(found, frames)
    assert enhanced[0].shape == others["mask_spk1"].shape == features.shape
    assert difference(enhanced[0], features * others["mask_spk1"]) < 1e-6
    speech, _ = decoder(enhanced[0], lengths)
    assert speech.shape == (2, samples) and torch.isfinite(speech).all()


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_few_frames_and_kinds_of_complex_numbers(build, frames):
    separator, x = build().eval(), spectrum(frames=frames)
    lengths = torch.tensor([frames, 1])
    ours = separator(ComplexTensor(x.real, x.imag), lengths, {})[0][0]
    assert isinstance(ours, ComplexTensor)
    assert difference(ours, separator(x, lengths, {})[0][0]) < 1e-6


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_valid_frames_do_not_know_of_padding(build, layer_by_layer):
    separator, x = build().eval(), spectrum(3, 20)
    if layer_by_layer:
        run_layer_by_layer(separator)
    lengths = torch.tensor([9, 20, 1])  # in no order
    x[0, 9:], x[2, 1:] = 100.0, 0.0
    (padded,), _, _ = separator(x, lengths, {})
    for number, length in enumerate(lengths.tolist()):
        (alone,), _, _ = separator(x[number : number + 1, :length], lengths[number, None], {})
        assert difference(padded[number : number + 1, :length], alone) < 1e-5
    # The tolerance is tight enough: what is valid does matter, in every frame.
    x[0, 8] += 1
    changed = separator(x, lengths, {})[0][0]
    assert (changed - padded)[0, :9].abs().amax(-1).min() > 1e-5
    assert difference(changed[1:], padded[1:]) < 1e-5


def test_layer_by_layer_gives_the_same_gradients(build):
    stock = build()
    ours = copy.deepcopy(stock)
    run_layer_by_layer(ours)
    assert list(stock.state_dict()) == list(ours.state_dict())
    gradients = []
    for separator in (stock, ours):
        separator(spectrum(), torch.tensor([12, 5]), {})[0][0].abs().square().mean().backward()
        gradients.append([parameter.grad for parameter in separator.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_silence_stays_silence_with_moderate_gradients(build):
    separator, x = build(), spectrum()
    x[0], x[1, 5:] = 0, 0
    x.requires_grad_()
    heard = []
    separator.tap.register_forward_hook(lambda _, inputs, output: heard.append(output))
    (enhanced,), _, _ = separator(x, torch.tensor([12, 12]), {})
    assert (enhanced[0] == 0).all() and (enhanced[1, 5:] == 0).all()
    # What is aligned with the text reaches silent frames too, where the enhancement loss does not.
    (enhanced.abs().mean() + heard[0].square().mean()).backward()
    gradients = [x.grad, *(p.grad for p in separator.parameters() if p.grad is not None)]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) < 100


def test_gradients_reach_all_parameters_and_the_tap_is_before_the_last_layer(build):
    separator = build()
    heard = []
    separator.tap.register_forward_hook(lambda _, inputs, output: heard.append(output))
    (enhanced,), _, _ = separator(spectrum(), torch.tensor([12, 9]), {})
    enhanced.abs().mean().backward()
    missing = [n for n, p in separator.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    wide = (2, 12, 12) if isinstance(separator, BLSTMSumSeparator) else (2, 8, 12, 17)
    assert heard[0].shape == wide
    separator.zero_grad()
    heard.clear()
    separator(spectrum(), torch.tensor([12, 9]), {})
    heard[0].square().mean().backward()
    reached = {n for n, p in separator.named_parameters() if p.grad is not None and p.grad.any()}
    last = "blstm" if isinstance(separator, BLSTMSumSeparator) else "layers"
    count = len(getattr(separator, last))
    assert any(name.startswith(f"{last}.{count - 2}.") for name in reached)
    assert not any(name.startswith(f"{last}.{count - 1}.") for name in reached)


def test_saved_weights_restore_the_model(build, tmp_path):
    separator, x, lengths = build().eval(), spectrum(), torch.tensor([12, 5])
    torch.save(separator.state_dict(), tmp_path / "model.pth")
    other = build().eval()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    assert difference(other(x, lengths)[0][0], separator(x, lengths)[0][0]) > 1e-3
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert difference(other(x, lengths)[0][0], separator(x, lengths)[0][0]) == 0


def test_a_few_steps_learn_a_batch(build):
    separator, noisy, lengths = build(), spectrum(), torch.tensor([12, 9])
    clean = noisy * torch.linspace(0, 1, FREQUENCIES)  # one fixed filter
    optimizer = torch.optim.Adam(separator.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        (enhanced,), _, _ = separator(noisy, lengths, {})
        loss = (enhanced - clean).abs()[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_published_blstm_has_the_size_of_its_matrices():
    lstm = 2 * (4 * 256 * (256 + 256) + 2 * 4 * 256)  # two directions, four gates, two biases
    linear = (201 + 1) * 256 + (256 + 1) * 201
    count = sum(parameter.numel() for parameter in BLSTMSumSeparator(201).parameters())
    assert count == 2 * lstm + linear == 2_208_713


def test_mask_is_a_gain_and_mapping_can_amplify():
    x, lengths = spectrum(), torch.tensor([12, 12])
    masking, mapping = BUILDERS["mask"](FREQUENCIES), BUILDERS["mapping"](FREQUENCIES)
    with torch.no_grad():
        mapping.output_layer.bias.fill_(math.log1p(10))
        mapping.output_layer.weight.zero_()
    assert (masking(x, lengths)[0][0].abs() < x.abs()).all()
    enhanced = mapping(x, lengths)[0][0]
    assert torch.allclose(enhanced.abs(), torch.full(x.shape, 10.0), rtol=1e-4)
    assert torch.allclose(enhanced.angle(), x.angle(), atol=1e-4)  # the noisy phase


def test_wrong_values_and_real_features_are_refused(build):
    with pytest.raises(CmktError, match="encoder: stft"):
        build()(torch.randn(2, 5, FREQUENCIES), torch.tensor([5, 5]), {})
    for kind, wrong in [
        (BLSTMSumSeparator, {"layer": 0}),
        (BLSTMSumSeparator, {"mapping": "no"}),
        (DenseDualPathSeparator, {"channels": 10, "heads": 4}),
        (DenseDualPathSeparator, {"layers": 0}),
    ]:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kind(FREQUENCIES, **wrong)
