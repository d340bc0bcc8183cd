"""Integrate-and-fire: divides as the paper's loop does, knows of the text only its length."""

import pytest
import torch
from torch.nn import functional as F

from cmkt.transfer.alignment.integrate_and_fire import IntegrateAndFire, integrate

D_A, D_T = 6, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(acoustic_lengths=(20, 13), text_lengths=(6, 4)):
    acoustic_lengths, text_lengths = torch.tensor(acoustic_lengths), torch.tensor(text_lengths)
    acoustic = torch.randn(len(acoustic_lengths), int(acoustic_lengths.max()), D_A)
    text = torch.randn(len(text_lengths), int(text_lengths.max()), D_T)
    return acoustic, acoustic_lengths, text, text_lengths


def integrate_in_a_loop(weights: list[float], tokens: int) -> torch.Tensor:
    """Add frames up one after the other and fire at 1, for weights that add up to `tokens`."""
    shares = torch.zeros(tokens, len(weights), dtype=torch.float64)
    token, gathered = 0, 0.0
    for frame, left in enumerate(weights):
        while left > 1e-9 and token < tokens:
            used = min(left, 1 - gathered)
            shares[token, frame] += used
            gathered, left = gathered + used, left - used
            if gathered > 1 - 1e-9:
                token, gathered = token + 1, 0.0
    return shares


def test_equal_weights_by_hand():
    valid = torch.tensor([[True] * 5 + [False]])
    weights = integrate(torch.zeros(1, 6), valid, torch.tensor([2]), 3)
    expected = [[0.4, 0.4, 0.2, 0, 0, 0], [0, 0, 0.2, 0.4, 0.4, 0], [0] * 6]
    assert torch.allclose(weights[0], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize(("frames", "tokens"), [(30, 7), (30, 1), (5, 12), (1, 3), (400, 60)])
def test_equals_adding_up_frame_by_frame(frames, tokens):
    logits = 2 * torch.randn(3, frames)
    valid = torch.ones(3, frames, dtype=torch.bool)
    weights = integrate(logits, valid, torch.full((3,), tokens), tokens)
    scaled = logits.double().sigmoid()
    scaled = scaled / scaled.sum(-1, keepdim=True) * tokens
    expected = torch.stack([integrate_in_a_loop(row.tolist(), tokens) for row in scaled])
    assert (weights - expected).abs().max() < 3e-5
    assert (weights.sum(-1) - 1).abs().max() < 1e-5


def test_quantity_loss_by_hand():
    """A fresh module without context gives every frame the weight 1 / (1 + e^3)."""
    model = IntegrateAndFire(D_A, D_T)
    torch.nn.init.zeros_(model.to_logit.weight)
    loss = model(*batch()).loss
    weight = 1 / (1 + torch.tensor(3.0).exp())
    assert torch.allclose(
        loss, torch.stack([6 - 20 * weight, 4 - 13 * weight]) / torch.tensor([6, 4])
    )


def test_rows_sum_to_one_cover_only_valid_frames_and_make_zhat():
    model = IntegrateAndFire(D_A, D_T, width=16)
    acoustic, acoustic_lengths, text, text_lengths = batch()
    zhat, weights, _, _ = model(acoustic, acoustic_lengths, text, text_lengths, need_weights=True)
    assert zhat.shape == text.shape and weights.shape == (2, 6, 20)
    assert torch.allclose(weights.sum(-1), torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2]))
    assert weights[1, :, 13:].abs().max() == 0 and weights.min() >= 0
    mean = model.to_text(weights @ model.from_acoustic(acoustic))
    assert torch.allclose(zhat[0], mean[0], atol=1e-5)
    assert model(acoustic, acoustic_lengths, text, text_lengths).weights is None


def test_only_the_number_of_tokens_matters():
    model = IntegrateAndFire(D_A, D_T, width=16)
    acoustic, acoustic_lengths, text, text_lengths = batch()
    one = model(acoustic, acoustic_lengths, text, text_lengths)
    other = model(acoustic, acoustic_lengths, torch.randn_like(text), text_lengths)
    assert torch.equal(one.zhat, other.zhat) and torch.equal(one.loss, other.loss)
    fewer = model(acoustic, acoustic_lengths, text, text_lengths - 1)
    assert (one.zhat - fewer.zhat)[:, :3].abs().max() > 1e-4


@pytest.mark.parametrize("rubbish", [7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(rubbish):
    model = IntegrateAndFire(D_A, D_T, width=16, kernel=5)
    acoustic, acoustic_lengths, text, text_lengths = batch()
    real = torch.arange(6)[None] < text_lengths[:, None]

    def run(acoustic, text):
        model.zero_grad()
        acoustic = acoustic.clone().requires_grad_()
        aligned = model(acoustic, acoustic_lengths, text, text_lengths)
        zhat = aligned.zhat[:, :6][real]
        (zhat.square().sum() + aligned.loss.sum()).backward()
        gradients = [acoustic.grad, *(p.grad for p in model.parameters())]
        return [zhat, aligned.loss, gradients[0][0, :20], gradients[0][1, :13], *gradients[1:]], (
            gradients[0]
        )

    acoustic[1, 13:] = 0
    expected, _ = run(acoustic, text)
    long_acoustic = F.pad(acoustic, (0, 0, 0, 9), value=rubbish)
    long_acoustic[1, 13:] = rubbish
    long_text = F.pad(text, (0, 0, 0, 3), value=rubbish)
    found, gradient = run(long_acoustic, long_text)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert gradient[:, 20:].abs().max() == gradient[1, 13:].abs().max() == 0


@pytest.mark.parametrize("level", [-1e4, -80.0, 0.0, 1e4])
@pytest.mark.parametrize("acoustic_lengths", [(20, 13), (20, 0), (1, 20)])
@pytest.mark.parametrize("text_lengths", [(6, 4), (0, 1), (1, 6)])
def test_extremes_stay_finite_and_reach_every_parameter(level, acoustic_lengths, text_lengths):
    model = IntegrateAndFire(D_A, D_T, width=16)
    torch.nn.init.constant_(model.to_logit.bias, level)
    acoustic, acoustic_lengths, text, text_lengths = batch(acoustic_lengths, text_lengths)
    aligned = model(acoustic, acoustic_lengths, text, text_lengths, need_weights=True)
    (aligned.zhat.sum() + aligned.loss.sum()).backward()
    assert aligned.loss.shape == (2,)
    for value in (aligned.zhat, aligned.weights, aligned.loss):
        assert value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    total = text_lengths * (acoustic_lengths > 0)
    assert torch.allclose(aligned.weights.sum((1, 2)), total.float(), atol=1e-5)


def test_long_utterances():
    model = IntegrateAndFire(D_A, D_T)
    aligned = model(*batch((4000, 3000), (512, 1)), need_weights=True)
    assert aligned.zhat.isfinite().all() and aligned.loss.isfinite().all()
    sums = aligned.weights.sum(-1)
    assert (sums[0] - 1).abs().max() < 1e-4 and abs(sums[1, 0] - 1) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_alignment_in_float32(dtype):
    model = IntegrateAndFire(D_A, D_T)
    acoustic, acoustic_lengths, text, text_lengths = batch()
    acoustic = acoustic.to(dtype)
    expected = model(acoustic.float(), acoustic_lengths, text, text_lengths)
    with torch.autocast("cpu", dtype=dtype):
        aligned = model(acoustic, acoustic_lengths, text, text_lengths)
    assert aligned.zhat.dtype == aligned.loss.dtype == torch.float32
    assert torch.equal(aligned.zhat, expected.zhat) and torch.equal(aligned.loss, expected.loss)


def test_learns_where_tokens_begin_and_what_they_are():
    """Words of unequal length; the last channel marks where one begins."""
    codebook, spoken = torch.randn(8, D_T), torch.randn(8, D_A)

    def sample(size=16):
        words = torch.randint(8, (size, 4))
        length = torch.randint(2, 10, (size, 4))
        length[:, 3] = 30 - length[:, :3].sum(1)  # 3 to 24
        owner = torch.stack([torch.arange(4).repeat_interleave(row) for row in length])  # (B, 30)
        begins = F.pad(owner.diff(dim=1), (1, 0), value=1)
        acoustic = torch.cat([spoken[words.gather(1, owner)], 3.0 * begins[..., None]], -1)
        lengths = torch.full((size,), 30), torch.full((size,), 4)
        return (acoustic, lengths[0], codebook[words], lengths[1]), owner

    def measure(model):
        inputs, owner = sample(64)
        aligned = model(*inputs, need_weights=True)
        inside = owner[:, None] == torch.arange(4)[:, None]  # (B, T_t, T_a)
        matched = F.cosine_similarity(aligned.zhat, inputs[2], dim=-1).mean()
        mismatched = F.cosine_similarity(aligned.zhat.roll(1, 0), inputs[2], dim=-1).mean()
        found = (aligned.weights * inside).sum(-1).mean()
        return found.item(), (matched - mismatched).item()

    model = IntegrateAndFire(D_A + 1, D_T, width=32)
    before, _ = measure(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        inputs, _ = sample()
        aligned = model(*inputs)
        cosine = F.cosine_similarity(aligned.zhat, inputs[2], dim=-1)
        optimizer.zero_grad()
        ((1 - cosine).mean() + aligned.loss.mean()).backward()
        optimizer.step()
    after, gap = measure(model)
    assert after > 0.8 > before + 0.15
    assert gap > 0.6


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ({"width": 0}, "alignment.width .*at least 1"),
        ({"kernel": 4}, "alignment.kernel must be odd, not 4"),
        ({"kernel": "3"}, "alignment.kernel .*'3'"),
    ],
)
def test_wrong_settings_name_the_key(conf, words):
    with pytest.raises(ValueError, match=words):
        IntegrateAndFire(D_A, D_T, **conf)
