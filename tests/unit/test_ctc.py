"""Alignment by CTC: torch's loss, posteriors as counted by hand, frames only in zhat."""

import itertools
import warnings

import pytest
import torch
from torch.nn import functional as F

from cmkt.transfer.alignment.ctc import MonotonicCTC, posteriors

D_A, D_T, V = 6, 5, 9


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(acoustic_lengths=(20, 13), text_lengths=(6, 4)):
    acoustic_lengths, text_lengths = torch.tensor(acoustic_lengths), torch.tensor(text_lengths)
    acoustic = torch.randn(len(acoustic_lengths), int(acoustic_lengths.max()), D_A)
    text = torch.randn(len(text_lengths), int(text_lengths.max()), D_T)
    ids = torch.stack([torch.randperm(V)[: text.shape[1]] for _ in text])
    return acoustic, acoustic_lengths, text, text_lengths, ids


def paths(frames: int, tokens: int):
    """List every sequence of places: 0 is the blank, i is token i; in order, none left out."""
    for path in itertools.product(range(tokens + 1), repeat=frames):
        runs = [place for place, _ in itertools.groupby(path) if place]
        if runs == list(range(1, tokens + 1)):
            yield path


@pytest.mark.parametrize(("frames", "tokens"), [(5, 2), (4, 3), (3, 3), (4, 1)])
def test_posteriors_equal_the_sum_over_all_paths(frames, tokens):
    log_probs = torch.randn(1, frames, tokens + 1) - 2
    nll, shares = posteriors(log_probs, torch.tensor([frames]), torch.tensor([tokens]))
    listed = list(paths(frames, tokens))
    probability = torch.stack(
        [log_probs[0, torch.arange(frames), list(path)].sum() for path in listed]
    ).exp()
    expected = torch.zeros(frames, tokens + 1)
    for path, p in zip(listed, probability / probability.sum(), strict=True):
        expected[torch.arange(frames), list(path)] += p
    assert torch.allclose(nll, -probability.sum().log(), atol=1e-5)
    assert torch.allclose(shares[0], expected, atol=1e-5)


def test_loss_and_its_gradients_equal_those_of_torch():
    """For texts in which no token follows itself."""
    model = MonotonicCTC(D_A, D_T, V, width=16)
    acoustic, acoustic_lengths, text, text_lengths, ids = batch()
    ids[0] = torch.tensor([3, 1, 3, 0, 8, 3])  # the same token at several places
    acoustic.requires_grad_()
    parts = [acoustic, model.head.weight, model.head.bias, model.from_acoustic[1].weight]
    ours = model(acoustic, acoustic_lengths, text, text_lengths, ids).loss
    log_probs = model.head(model.from_acoustic(acoustic)).log_softmax(-1).transpose(0, 1)
    theirs = F.ctc_loss(log_probs, ids, acoustic_lengths, text_lengths, V, reduction="none")
    theirs = theirs / text_lengths
    assert torch.allclose(ours, theirs, atol=1e-5)
    weighted = torch.tensor([1.0, 0.3])
    expected = torch.autograd.grad((theirs * weighted).sum(), parts)
    found = torch.autograd.grad((ours * weighted).sum(), parts)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_equal_neighbours_need_no_blank_and_share_the_frames_in_order():
    model = MonotonicCTC(D_A, D_T, V, width=16)
    acoustic, acoustic_lengths, text, text_lengths, _ = batch((4, 2), (2, 2))
    ids = torch.zeros(2, 2, dtype=torch.long)
    aligned = model(acoustic, acoustic_lengths, text, text_lengths, ids, need_weights=True)
    assert torch.allclose(aligned.weights[1], torch.eye(2, 4), atol=1e-6)
    centre = aligned.weights[0] @ torch.arange(4.0)
    assert centre[1] > centre[0] + 0.5
    log_probs = model.head(model.from_acoustic(acoustic[1, :2])).log_softmax(-1)
    assert torch.allclose(aligned.loss[1], -log_probs[:, 0].mean(), atol=1e-5)


def test_rows_sum_to_one_in_order_and_make_zhat():
    model = MonotonicCTC(D_A, D_T, V, width=16)
    acoustic, acoustic_lengths, text, text_lengths, ids = batch()
    aligned = model(acoustic, acoustic_lengths, text, text_lengths, ids, need_weights=True)
    zhat, weights = aligned.zhat, aligned.weights
    assert zhat.shape == text.shape and weights.shape == (2, 6, 20)
    assert torch.allclose(weights.sum(-1), torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2]))
    assert weights[1, :, 13:].abs().max() == 0 and weights.min() >= 0
    for row, tokens in zip(weights, (6, 4), strict=True):
        assert ((row @ torch.arange(20.0))[:tokens].diff() > 0).all()
    mean = model.to_text(weights @ model.from_acoustic(acoustic))
    assert torch.allclose(zhat[0], mean[0], atol=1e-5)
    assert model(acoustic, acoustic_lengths, text, text_lengths, ids).weights is None


def test_embeddings_of_the_text_change_nothing():
    model = MonotonicCTC(D_A, D_T, V, width=16)
    acoustic, acoustic_lengths, text, text_lengths, ids = batch()
    one = model(acoustic, acoustic_lengths, text, text_lengths, ids)
    other = model(acoustic, acoustic_lengths, torch.randn_like(text), text_lengths, ids)
    assert torch.equal(one.zhat, other.zhat) and torch.equal(one.loss, other.loss)


@pytest.mark.parametrize("rubbish", [7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("rubbish_id", [-1, 3, 10_000])
def test_padding_changes_nothing(rubbish, rubbish_id):
    model = MonotonicCTC(D_A, D_T, V, width=16)
    acoustic, acoustic_lengths, text, text_lengths, ids = batch()
    real = torch.arange(6)[None] < text_lengths[:, None]

    def run(acoustic, text, ids):
        model.zero_grad()
        acoustic = acoustic.clone().requires_grad_()
        aligned = model(acoustic, acoustic_lengths, text, text_lengths, ids)
        zhat = aligned.zhat[:, :6][real]
        (zhat.square().sum() + aligned.loss.sum()).backward()
        kept = acoustic.grad[0, :20], acoustic.grad[1, :13]
        found = [zhat, aligned.loss, *kept, *(p.grad for p in model.parameters())]
        return found, acoustic.grad

    expected, _ = run(acoustic, text, ids)
    long_acoustic = F.pad(acoustic, (0, 0, 0, 9), value=rubbish)
    long_acoustic[1, 13:] = rubbish
    long_text, long_ids = F.pad(text, (0, 0, 0, 3), value=rubbish), F.pad(ids, (0, 3))
    long_ids[:, 6:] = long_ids[1, 4:] = rubbish_id
    found, gradient = run(long_acoustic, long_text, long_ids)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert gradient[:, 20:].abs().max() == gradient[1, 13:].abs().max() == 0


def test_what_does_not_fit_has_no_loss_and_uniform_weights_and_is_told_once():
    model = MonotonicCTC(D_A, D_T, V, width=16)
    acoustic, _, text, text_lengths, ids = batch((20, 20, 20, 20), (6, 4, 4, 6))
    acoustic_lengths = torch.tensor([20, 3, 0, 20])
    ids[3, 1] = -1
    args = acoustic, acoustic_lengths, text, text_lengths, ids
    with pytest.warns(UserWarning, match="fewer frames than tokens"):
        aligned = model(*args, need_weights=True)
    assert (aligned.loss[1:] == 0).all() and aligned.loss[0] > 0
    assert torch.allclose(aligned.weights[1, :4, :3], torch.full((4, 3), 1 / 3))
    assert aligned.weights[2].abs().max() == 0
    assert torch.allclose(aligned.weights[3], torch.full((6, 20), 1 / 20))
    alone = model(*(x[:1] for x in args))
    assert torch.allclose(aligned.loss[:1], alone.loss)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad(model(*args).loss.sum(), model.head.weight)
    (expected,) = torch.autograd.grad(alone.loss.sum(), model.head.weight)
    assert torch.allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("acoustic_lengths", [(20, 13), (20, 0), (1, 20)])
@pytest.mark.parametrize("text_lengths", [(6, 4), (0, 1), (1, 6), (0, 0)])
@pytest.mark.filterwarnings("ignore:alignment ctc")
def test_extremes_stay_finite_and_reach_every_parameter(scale, acoustic_lengths, text_lengths):
    model = MonotonicCTC(D_A, D_T, V, width=16)
    with torch.no_grad():
        model.head.weight *= scale
    acoustic, acoustic_lengths, text, text_lengths, ids = batch(acoustic_lengths, text_lengths)
    aligned = model(acoustic, acoustic_lengths, text, text_lengths, ids, need_weights=True)
    (aligned.zhat.sum() + aligned.loss.sum()).backward()
    assert aligned.loss.shape == (2,)
    for value in (aligned.zhat, aligned.weights, aligned.loss):
        assert value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    total = text_lengths * (acoustic_lengths > 0)
    assert torch.allclose(aligned.weights.sum((1, 2)), total.float(), atol=1e-4)


def test_long_utterances():
    model = MonotonicCTC(D_A, D_T, V)
    acoustic, acoustic_lengths, text, text_lengths, _ = batch((4000, 3000), (512, 1))
    ids = torch.randint(V, (2, 512))
    args = acoustic, acoustic_lengths, text, text_lengths, ids
    aligned = model(*args, need_weights=True)
    aligned.loss.sum().backward()
    sums = aligned.weights.sum(-1)
    assert (sums[0] - 1).abs().max() < 1e-4 and abs(sums[1, 0] - 1) < 1e-4
    assert all(p.grad.isfinite().all() for p in model.head.parameters())
    exact = model.head(model.from_acoustic(acoustic)).double().log_softmax(-1)
    exact = exact.gather(2, F.pad(ids, (1, 0), value=V)[:, None].expand(-1, 4000, -1))
    nll, shares = posteriors(exact, acoustic_lengths, text_lengths)
    assert torch.allclose(aligned.loss.double(), nll / text_lengths, rtol=1e-4)
    exact = shares[0, :, 1:].T / shares[0, :, 1:].sum(0)[:, None]
    assert (aligned.weights[0] - exact).abs().sum(-1).max() < 0.1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_gives_the_same(mode):
    model = MonotonicCTC(D_A, D_T, V, width=16)
    args = batch()
    expected = model(*args)
    with mode():
        found = model(*(x.clone() for x in args))
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.zhat, expected.zhat)
    assert not found.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_alignment_in_float32(dtype):
    model = MonotonicCTC(D_A, D_T, V)
    acoustic, *rest = batch()
    acoustic = acoustic.to(dtype)
    expected = model(acoustic.float(), *rest)
    with torch.autocast("cpu", dtype=dtype):
        aligned = model(acoustic, *rest)
    assert aligned.zhat.dtype == aligned.loss.dtype == torch.float32
    assert torch.equal(aligned.zhat, expected.zhat) and torch.equal(aligned.loss, expected.loss)


def test_finds_the_segments_of_words_and_what_they_are():
    """Words of unequal length with silence in between; every word is spoken as its own vector."""
    codebook, spoken = torch.randn(V, D_T), torch.randn(V + 1, D_A)

    def sample(size=16):
        words = torch.randint(V, (size, 4))
        order = torch.full((size, 9), V)  # silence, word, silence, ...
        order[:, 1::2] = words
        length = torch.randint(1, 6, (size, 9))
        length[:, 8] = 41 - length[:, :8].sum(1)  # 1 to 33
        owner = torch.stack([torch.arange(9).repeat_interleave(row) for row in length])  # (B, 41)
        acoustic = spoken[order.gather(1, owner)]
        lengths = torch.full((size,), 41), torch.full((size,), 4)
        return (acoustic, lengths[0], codebook[words], lengths[1], words), owner

    def measure(model):
        inputs, owner = sample(64)
        aligned = model(*inputs, need_weights=True)
        inside = owner[:, None] == 2 * torch.arange(4)[:, None] + 1  # (B, T_t, T_a)
        matched = F.cosine_similarity(aligned.zhat, inputs[2], dim=-1).mean()
        other = model(inputs[0].roll(1, 0), *inputs[1:])
        mismatched = F.cosine_similarity(other.zhat, inputs[2], dim=-1).mean()
        found = (aligned.weights * inside).sum(-1).mean()
        return found.item(), matched.item(), mismatched.item()

    model = MonotonicCTC(D_A, D_T, V, width=32)
    before, _, _ = measure(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        inputs, _ = sample()
        aligned = model(*inputs)
        cosine = F.cosine_similarity(aligned.zhat, inputs[2], dim=-1)
        optimizer.zero_grad()
        ((1 - cosine).mean() + aligned.loss.mean()).backward()
        optimizer.step()
    after, matched, mismatched = measure(model)
    assert before < 0.5 and after > 0.95
    assert matched > 0.85
    assert matched - mismatched > 0.3


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ({"vocabulary": None}, "alignment.vocabulary .*None"),
        ({"vocabulary": 0}, "alignment.vocabulary .*at least 1"),
        ({"vocabulary": 5, "width": 0}, "alignment.width"),
    ],
)
def test_wrong_settings_name_the_key(conf, words):
    with pytest.raises(ValueError, match=words):
        MonotonicCTC(D_A, D_T, **conf)


def test_missing_or_wrong_token_ids_are_refused():
    model = MonotonicCTC(D_A, D_T, V)
    *args, ids = batch()
    with pytest.raises(ValueError, match="alignment ctc needs token ids"):
        model(*args)
    ids[1, 2] = V
    with pytest.raises(ValueError, match="token id 9 is not below alignment.vocabulary 9"):
        model(*args, ids)
    with pytest.raises(ValueError, match=r"token ids of shape \(2, 5\)"):
        model(*args, ids[:, :5])
    nothing = model(args[0], args[1], args[2][:, :0], torch.zeros(2, dtype=torch.long))
    assert nothing.zhat.shape == (2, 0, D_T) and (nothing.loss == 0).all()
