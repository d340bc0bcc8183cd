"""What every alignment promises, each tested alike."""

import pytest
import torch
from torch.nn import functional as F

from cmkt.transfer import ALIGNMENTS, CrossModalTransfer, build_alignment

D_A, D_T, VOCABULARY = 6, 5, 9


def make_batch(frames=(20, 13), tokens=(6, 4)):
    torch.manual_seed(0)
    acoustic = torch.randn(len(frames), max(frames), D_A)
    text = torch.randn(len(tokens), max(tokens), D_T)
    ids = torch.randint(VOCABULARY, text.shape[:2])
    return acoustic, torch.tensor(frames), text, torch.tensor(tokens), ids


def make(kind: str, **conf) -> CrossModalTransfer:
    torch.manual_seed(0)
    conf = {"alignment": {"type": kind, "width": 16}, "vocabulary": VOCABULARY, **conf}
    return CrossModalTransfer(D_A, D_T, **conf)


@pytest.fixture(params=ALIGNMENTS)
def kind(request) -> str:
    return request.param


def test_rows_of_weights_are_shares_of_valid_frames(kind):
    acoustic, frames, text, tokens, ids = make_batch()
    aligned = make(kind).align(acoustic, frames, text, tokens, ids)
    assert aligned.zhat.shape == text.shape
    assert aligned.weights.shape == (2, 6, 20)
    sums = aligned.weights.sum(-1)
    assert torch.allclose(sums[0], torch.ones(6)) and torch.allclose(sums[1, :4], torch.ones(4))
    assert aligned.weights.min() >= 0
    assert aligned.weights[1, :, 13:].abs().max() == 0


@pytest.mark.parametrize("rubbish", [7.0, float("nan")])
def test_padding_changes_neither_loss_nor_gradient(kind, rubbish):
    model = make(kind, loss={"cosine": 1.0, "contrastive": 0.5})
    acoustic, frames, text, tokens, ids = make_batch()
    acoustic.requires_grad_()
    loss = model(acoustic, frames, text, tokens, ids)
    (gradient,) = torch.autograd.grad(loss, acoustic)
    padded = F.pad(acoustic.detach(), (0, 0, 0, 9), value=rubbish)
    padded[1, 13:] = rubbish
    more = F.pad(text, (0, 0, 0, 3), value=rubbish)
    more[1, 4:] = rubbish
    more_ids = F.pad(ids, (0, 3), value=-1)
    padded.requires_grad_()
    other = model(padded, frames, more, tokens, more_ids)
    (other_gradient,) = torch.autograd.grad(other, padded)
    assert abs(loss - other) < 1e-5
    assert (other_gradient[:, :20] - gradient).abs().max() < 1e-5
    assert other_gradient[:, 20:].abs().max() == other_gradient[1, 13:].abs().max() == 0


def test_gradients_reach_the_acoustics_and_never_the_text(kind):
    acoustic, frames, text, tokens, ids = make_batch()
    acoustic.requires_grad_()
    text.requires_grad_()
    model = make(kind)
    model(acoustic, frames, text, tokens, ids).backward()
    assert acoustic.grad[0].abs().max() > 0
    assert acoustic.grad.isfinite().all()
    assert text.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_batch_without_text_is_zero_and_reaches_every_parameter(kind, tokens):
    model = make(kind, misalignment={"mode": "random", "maximum": 2})
    acoustic, frames, *_ = make_batch()
    ids = torch.zeros(2, tokens, dtype=torch.long)
    loss = model(
        acoustic, frames, torch.zeros(2, tokens, D_T), torch.full((2,), min(tokens, 1)), ids
    )
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("frames", "tokens"), [((20, 13), (1, 1)), ((3, 2), (6, 4)), ((1, 1), (1, 1))]
)
def test_one_token_and_more_tokens_than_frames_stay_finite(kind, frames, tokens):
    acoustic, frames, text, tokens, ids = make_batch(frames, tokens)
    acoustic.requires_grad_()
    model = make(kind)
    loss = model(acoustic, frames, text, tokens, ids)
    loss.backward()
    assert loss.isfinite() and acoustic.grad.isfinite().all()
    values = model.eval().diagnostics(acoustic, frames, text, tokens, ids)
    assert values["transfer_gap"].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_alignment_in_float32(kind, dtype):
    acoustic, frames, text, tokens, ids = make_batch()
    acoustic = acoustic.to(dtype)
    model = make(kind)
    expected = model(acoustic.float(), frames, text, tokens, ids)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(acoustic, frames, text, tokens, ids)
    assert loss.dtype == torch.float32
    assert loss == expected


@pytest.mark.parametrize("side", ["targets", "queries"])
def test_every_side_of_the_misalignment_works(kind, side):
    batch = make_batch()
    moved = make(kind, misalignment={"mode": "fixed", "maximum": 2, "side": side})
    assert moved(*batch).isfinite()
    assert moved(*batch) != moved.eval()(*batch)


def test_long_sequences_stay_finite(kind):
    acoustic, frames, text, tokens, ids = make_batch((4000, 2500), (512, 300))
    acoustic.requires_grad_()
    loss = make(kind)(acoustic, frames, text, tokens, ids)
    loss.backward()
    assert loss.isfinite() and acoustic.grad.isfinite().all()


def test_what_leaks_and_what_cannot():
    """Only what does not read the embeddings gives the same zhat for other embeddings."""
    acoustic, frames, text, tokens, ids = make_batch()
    for kind in ALIGNMENTS:
        alignment = build_alignment({"type": kind}, D_A, D_T, VOCABULARY).eval()
        one, two = (
            alignment(acoustic, frames, x, tokens, ids).zhat for x in (text, torch.randn_like(text))
        )
        assert torch.equal(one, two) != alignment.uses_text, kind
