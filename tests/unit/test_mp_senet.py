"""MP-SENet: padding, silence, gradients, size; its losses: known values, phase wraps, padding."""

import math

import pytest
import torch
from espnet2.enh.decoder.stft_decoder import STFTDecoder
from espnet2.enh.encoder.stft_encoder import STFTEncoder
from espnet2.enh.espnet_model import ESPnetEnhancementModel
from espnet2.enh.loss.wrappers.fixed_order import FixedOrderSolver

from cmkt.errors import CmktError
from cmkt.espnet_plugin.separators.mp_senet import MPSENetSeparator
from cmkt.espnet_plugin.spectral_criterions import (
    SPECTRAL_CRITERIONS,
    AntiWrappingPhaseLoss,
    CompressedComplexLoss,
    CompressedMagnitudeLoss,
    ConsistencyLoss,
    RelativeL1Loss,
    SeparatorOutputSolver,
    anti_wrap,
)

KINDS = ["conformer", "transformer"]
SPECTRAL = ["compressed_magnitude", "compressed_complex", "anti_wrapping_phase"]


def separator(frequencies=33, **settings):
    torch.manual_seed(0)
    settings = {"channels": 8, "blocks": 2, "kernel": 5, "heads": 2, **settings}
    return MPSENetSeparator(frequencies, **settings)


def spectra(batch=2, frames=20, frequencies=33, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, frequencies)
    return torch.complex(*(torch.randn(shape, generator=generator) for _ in range(2)))


def model(**settings):
    """Return a small model with all losses of the paper."""
    stft = {"n_fft": 64, "hop_length": 16}
    names = {"compressed_magnitude": 0.9, "compressed_complex": 0.1, "relative_l1": 0.2}
    losses = [FixedOrderSolver(SPECTRAL_CRITERIONS[name](), w) for name, w in names.items()]
    losses += [
        SeparatorOutputSolver(AntiWrappingPhaseLoss(), 0.3),
        SeparatorOutputSolver(ConsistencyLoss(**stft), 0.1),
    ]
    parts = STFTEncoder(**stft), separator(**settings), STFTDecoder(**stft)
    return ESPnetEnhancementModel(*parts, None, losses, normalize_variance=True)


@pytest.mark.parametrize("block", KINDS)
@pytest.mark.parametrize("frequencies", [3, 32, 33])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_any_number_of_frames_and_frequencies(block, frequencies, frames):
    x = spectra(2, frames, frequencies)
    lengths = torch.tensor([frames, max(1, frames - 4)])
    (y,), found, others = separator(frequencies, block=block)(x, lengths)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert torch.equal(found, lengths) and torch.isfinite(y.abs()).all()
    # The mask is at most 2, on compressed magnitudes.
    valid = slice(0, lengths[1])
    largest = 2 * x.abs()[:, valid] ** 0.3 + 1e-3
    assert (others["compressed_spk1"].abs()[:, valid] < largest).all()


@pytest.mark.parametrize("block", KINDS)
def test_padding_changes_nothing(block):
    network, x = separator(block=block).eval(), spectra(3, 24)
    lengths = torch.tensor([24, 13, 5])
    (together,), _, others = network(x, lengths)
    for one, size in enumerate(lengths):
        (alone,), _, _ = network(x[one : one + 1, :size], lengths[one : one + 1])
        assert torch.allclose(together[one, :size], alone[0], rtol=1e-4, atol=1e-4)
        assert not together[one, size:].any()
        assert not others["compressed_spk1"][one, size:].any()


def test_frames_of_padding_do_not_reach_the_tap():
    network, x, heard = separator().eval(), spectra(2, 24), []
    network.tap.register_forward_hook(lambda module, inputs, output: heard.append(output))
    other = x.clone()
    other[1, 13:] = 100
    for value in (x, other):
        network(value, torch.tensor([24, 13]))
    assert heard[0].shape == (2, 8, 24, 16)
    assert torch.equal(heard[0][1, :, :13], heard[1][1, :, :13])


@pytest.mark.parametrize("block", KINDS)
@pytest.mark.parametrize("silent", [True, False])
def test_gradients_are_finite_and_reach_every_parameter(block, silent):
    network = separator(block=block)
    x = spectra(2, 12).mul(0 if silent else 1).requires_grad_()
    (y,), _, _ = network(x, torch.tensor([12, 7]))
    assert torch.isfinite(y.abs()).all()
    assert not silent or y.abs().max() < 1e-3
    (y.real.sum() + y.imag.sum() + y.abs().sum()).backward()
    assert torch.isfinite(x.grad.abs()).all()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert silent or parameter.grad.any(), name


def test_checkpointing_gives_the_same_gradients():
    x, results = spectra(2, 12), []
    for checkpointing in (False, True):
        network = separator(checkpointing=checkpointing, dropout=0.1)
        torch.manual_seed(2)
        (y,), _, _ = network(x, torch.tensor([12, 7]))
        y.abs().sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in network.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_each_speaker_has_a_spectrum_of_its_own():
    enhanced, _, _ = separator(num_spk=2)(spectra(), torch.tensor([20, 20]))
    assert len(enhanced) == 2 and not torch.allclose(enhanced[0], enhanced[1])


@pytest.mark.parametrize(("block", "published"), [("conformer", 2.05e6), ("transformer", 2.26e6)])
def test_size_is_the_published_one(block, published):
    size = sum(p.numel() for p in MPSENetSeparator(201, block=block).parameters())
    assert size == pytest.approx(published, rel=0.02)


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"channels": 9}, {"kernel": 4}, {"frequencies": 2}):
        with pytest.raises(CmktError, match="mp_senet"):
            separator(**wrong)
    for wrong in ({"block": "convformer"}, {"blocks": 0}, {"compression": 0}):
        with pytest.raises(ValueError, match="mp_senet"):
            separator(**wrong)


@pytest.mark.parametrize("block", KINDS)
def test_learns_one_batch_with_all_losses(block):
    enhancer = model(block=block).train()
    torch.manual_seed(3)
    clean = torch.sin(torch.arange(800) * torch.tensor([[0.3], [0.7]]))
    batch = {
        "speech_mix": 0.1 * (clean + 0.7 * torch.randn_like(clean)),
        "speech_mix_lengths": torch.tensor([800, 640]),
        "speech_ref1": 0.1 * clean,
    }
    for name in ("speech_mix", "speech_ref1"):
        batch[name][1, 640:] = 0
    optimizer, values = torch.optim.AdamW(enhancer.parameters(), 1e-2), []
    for _ in range(15):
        loss, stats, _ = enhancer(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append({name: float(value) for name, value in stats.items()})
    assert set(values[0]) == {*SPECTRAL_CRITERIONS, "loss"}
    assert values[-1]["loss"] < 0.7 * values[0]["loss"], values
    for name in ("compressed_magnitude", "anti_wrapping_phase", "relative_l1"):
        assert values[-1][name] < 0.9 * values[0][name], name


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_loss_of_equal_spectra_is_zero_and_padding_does_not_count(name):
    loss = SPECTRAL_CRITERIONS[name]()
    clean, enhanced = spectra(seed=1), spectra(seed=2)
    assert loss.name == name and not loss.compute_on_mask
    assert torch.equal(loss(clean, clean), torch.zeros(2))
    short = loss(clean, enhanced)
    padding = torch.zeros(2, 7, 33, dtype=clean.dtype)
    padded = loss(*(torch.cat([x, padding], 1) for x in (clean, enhanced)))
    assert (short > 0.01).all() and torch.allclose(short, padded, rtol=1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("silent", ["clean", "enhanced", "both"])
def test_spectral_loss_and_its_gradient_are_finite_in_silence(name, silent):
    clean, enhanced = (
        spectra(seed=seed).mul(side not in (silent, "both") and silent != "both")
        for seed, side in ((1, "clean"), (2, "enhanced"))
    )
    enhanced.requires_grad_()
    loss = SPECTRAL_CRITERIONS[name]()(clean, enhanced)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(enhanced.grad.abs()).all()


@pytest.mark.parametrize("name", [*SPECTRAL, "relative_l1"])
def test_the_level_of_the_recording_does_not_matter(name):
    loss = SPECTRAL_CRITERIONS[name]()
    pair = [spectra(seed=1), spectra(seed=2)]
    if name == "relative_l1":
        pair = [x.real.flatten(1) for x in pair]
    assert torch.allclose(loss(*pair), loss(*(100 * x for x in pair)), rtol=1e-3)


def test_compressed_losses_are_those_computed_by_hand():
    # At the clean level sqrt(0.75 * 32), a spectrum of constant magnitude has that magnitude.
    level = math.sqrt(0.75 * 32) ** 0.3
    clean = torch.full((1, 4, 33), 5.0, dtype=torch.cfloat)
    louder = 2**0.3 - 1
    magnitude, whole = CompressedMagnitudeLoss(), CompressedComplexLoss()
    assert magnitude(clean, 2 * clean).item() == pytest.approx((level * louder) ** 2, rel=1e-3)
    assert whole(clean, 2 * clean).item() == pytest.approx((level * louder) ** 2, rel=1e-3)
    # A turned phase does not change magnitudes; |1 - j|^2 = 2.
    assert magnitude(clean, 1j * clean).item() == pytest.approx(0, abs=1e-6)
    assert whole(clean, 1j * clean).item() == pytest.approx(2 * level**2, rel=1e-3)


def test_published_scale_is_that_of_white_noise_of_variance_one():
    """So the weights of the paper hold: its losses see waveforms of about this level."""
    torch.manual_seed(0)
    waveform = 0.01 * torch.randn(1, 32000)
    spectrum, _ = STFTEncoder(400, hop_length=100)(waveform, torch.tensor([32000]))
    found, _, _ = CompressedMagnitudeLoss(compression=1.0).compressed(spectrum, spectrum)
    wanted = spectrum / 0.01
    powers = [part.square().mean().item() for part in (found[0], wanted.real)]
    assert powers[0] == pytest.approx(powers[1], rel=0.05)


@pytest.mark.parametrize("turn", [0.4, -1.3, math.pi - 0.01])
def test_phase_loss_of_a_constant_turn_is_the_turn(turn):
    clean = spectra()
    turned = clean * complex(math.cos(turn), math.sin(turn))
    # Group delay and angular frequency do not see it.
    wanted = torch.full((2,), abs(turn))
    assert torch.allclose(AntiWrappingPhaseLoss()(clean, turned), wanted, atol=1e-4)


def test_phase_loss_sees_a_shift_in_time_by_its_group_delay():
    clean, slope = spectra(), 0.05
    angles = slope * torch.arange(33)
    turned = clean * torch.polar(torch.ones(33), angles)
    wanted = angles.mean().item() + slope
    assert AntiWrappingPhaseLoss()(clean, turned)[0].item() == pytest.approx(wanted, rel=1e-3)


def test_whole_turns_do_not_count():
    angles = torch.linspace(-3, 3, 50)
    for turns in (-2, -1, 1, 3):
        assert torch.allclose(anti_wrap(angles + 2 * math.pi * turns), angles.abs(), atol=1e-5)


def test_phase_where_nothing_was_said_does_not_count():
    clean, enhanced = spectra(seed=1), spectra(seed=1)
    clean[:, :, 5] = 0
    assert torch.equal(AntiWrappingPhaseLoss()(clean, enhanced), torch.zeros(2))


def test_phase_gradient_is_that_of_the_angle_and_bounded_near_zero():
    clean, enhanced = spectra(1, 1, 4), spectra(1, 1, 4, seed=2)
    enhanced[0, 0, 3] = 1e-12
    enhanced.requires_grad_()
    AntiWrappingPhaseLoss()(clean, enhanced).sum().backward()
    exact = enhanced.detach().clone().requires_grad_()
    error = exact.angle() - clean.angle()
    (anti_wrap(error).mean() + anti_wrap(error.diff(dim=-1)).mean()).backward()
    assert torch.allclose(enhanced.grad[..., :3], exact.grad[..., :3], rtol=1e-2)
    assert enhanced.grad[0, 0, 3].abs() < 200 < exact.grad[0, 0, 3].abs()


def stft_pair():
    """Return the compressed spectrum of a waveform, and one that is of no waveform."""
    torch.manual_seed(0)
    spectrum, _ = STFTEncoder(64, hop_length=16)(torch.randn(1, 640), torch.tensor([640]))
    consistent = spectrum * spectrum.abs() ** -0.7
    return consistent, consistent * torch.sign(torch.randn(spectrum.shape))


def test_consistency_is_zero_for_the_spectrum_of_a_waveform_only():
    loss, (consistent, other) = ConsistencyLoss(n_fft=64, hop_length=16), stft_pair()
    assert loss(None, consistent).item() < 1e-4
    assert loss(None, other).item() > 0.1
    other.requires_grad_()
    loss(None, other).sum().backward()
    assert torch.isfinite(other.grad.abs()).all() and other.grad.abs().max() > 0


def test_consistency_ignores_padding_and_bears_short_and_silent_utterances():
    loss, (_, other) = ConsistencyLoss(n_fft=64, hop_length=16), stft_pair()
    padded = torch.cat([other, torch.zeros(1, 9, 33)], 1)
    assert torch.allclose(loss(None, other), loss(None, padded), rtol=1e-4)
    batch = torch.cat([padded, torch.zeros_like(padded)]).requires_grad_()
    value = loss(None, batch)
    value.sum().backward()
    assert value[1] == 0 and torch.isfinite(batch.grad.abs()).all()
    assert loss(None, other[:, :2]).item() == 0
    with pytest.raises(CmktError, match="n_fft"):
        ConsistencyLoss(n_fft=400)(None, other)


def test_relative_l1_is_computed_by_hand_and_ends_with_the_clean_speech():
    clean = torch.tensor([[2.0, -2.0, 2.0, -2.0], [3.0, 3.0, 0.0, 0.0]])
    enhanced = clean + torch.tensor([[1.0], [1.5]])
    assert torch.allclose(RelativeL1Loss()(clean, enhanced), torch.tensor([0.5, 0.5]))
    silent = RelativeL1Loss()(torch.zeros(1, 4), torch.ones(1, 4))
    assert torch.isfinite(silent).all() and silent > 0


def test_separator_output_needs_a_criterion_and_a_separator_that_fit():
    with pytest.raises(CmktError, match="compressed_magnitude"):
        SeparatorOutputSolver(CompressedMagnitudeLoss())
    with pytest.raises(CmktError, match="mp_senet"):
        SeparatorOutputSolver(AntiWrappingPhaseLoss())([spectra()], [spectra()], {})
