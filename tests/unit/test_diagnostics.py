"""The diagnostics by hand, and the parts of the objective that read the progress of a training."""

import math

import pytest
import torch

from cmkt.transfer import CrossModalTransfer, FeedbackAdapter
from cmkt.transfer.diagnostics import entropy, gradient_norm, monotonicity, retrieval

EYE = torch.eye(8)


def test_retrieval_by_hand():
    # Nearer than the own vector are none, three and six candidates.
    zhat = torch.tensor([
        [1.0, 0, 0, 0, 0, 0, 0, 0],
        [0.0, 1, 2, 2, 2, 0, 0, 0],
        [2.0, 2, 1, 2, 2, 2, 2, 0],
    ])  # fmt: skip
    found = retrieval(zhat, EYE[:3], torch.arange(3), EYE, torch.arange(8))
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)


def test_retrieval_does_not_count_the_same_word_against_a_token():
    """Candidate 1 is nearer than the token's own vector: an error only if it is another word."""
    zhat, text = torch.tensor([[1.0, 0.9]]), torch.tensor([[0.0, 1.0]])
    candidates = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    same = retrieval(zhat, text, torch.tensor([7]), candidates, torch.tensor([7, 7]))
    other = retrieval(zhat, text, torch.tensor([7]), candidates, torch.tensor([7, 8]))
    unknown = retrieval(zhat, text, None, candidates, None)
    assert (same["top1"], other["top1"], unknown["top1"]) == (1, 0, 0)
    assert other["top5"] == 1


def test_entropy_and_monotonicity_by_hand():
    weights = torch.tensor([
        [[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0.25, 0.25, 0.25, 0.25]],
        [[0, 0, 1.0, 0], [0, 1.0, 0, 0], [0.5, 0.5, 0, 0]],
    ])  # fmt: skip
    mask = torch.tensor([[True, True, True], [True, True, False]])
    # Entropies over log 4: 0, 1/2, 1, 0, 0. Centres 0, 1.5, 1.5; 2, 1: one step of three is up.
    frames = torch.tensor([4, 4])
    assert entropy(weights, mask, frames).item() == pytest.approx((0.5 + 1) / 5)
    assert monotonicity(weights, mask).item() == pytest.approx(1 / 3)
    assert math.isnan(monotonicity(weights[:, :1], mask[:, :1]))


def test_gradient_norm_is_the_norm_over_all_tapped_tensors():
    one, two = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert gradient_norm(3 * one.sum() + 4 * two[0], [one, two]).item() == pytest.approx(34**0.5)
    assert gradient_norm(3 * one.sum(), [two]) == 0
    with torch.no_grad():  # as in validation
        assert gradient_norm(torch.tensor(1.0), [one]) == 0


def make(**conf):
    torch.manual_seed(0)
    return CrossModalTransfer(6, 5, alignment={"width": 16, "heads": 2}, **conf)


def make_batch():
    acoustic = torch.randn(3, 20, 6)
    return acoustic, torch.tensor([20, 13, 9]), torch.randn(3, 4, 5), torch.tensor([4, 3, 2])


def test_gradient_share_follows_the_weights_and_the_progress():
    transfer = make(alpha={"schedule": "decay", "alpha": 0.5, "until": 0.8})
    acoustic, *rest = make_batch()
    acoustic.requires_grad_()
    loss_se, loss_cma = acoustic.square().sum(), transfer(acoustic, *rest)
    of_se, of_cma = (gradient_norm(loss, [acoustic]) for loss in (loss_se, loss_cma))
    shares = []
    for transfer.progress in (0.0, 0.4, 0.8, 1.0):
        shares.append(transfer.gradient_share(loss_se, loss_cma, [acoustic]).item())
    assert shares[0] == pytest.approx((of_cma / (of_se + of_cma)).item())
    assert shares[1] == pytest.approx((0.25 * of_cma / (0.75 * of_se + 0.25 * of_cma)).item())
    assert shares[2] == shares[3] == 0
    assert transfer.combine(torch.tensor(2.0), torch.tensor(9.0)) == 2


def test_candidates_are_where_tokens_are_looked_for():
    """With its own tokens as the only candidates a token is always found at the first rank."""
    transfer = make(standardise=True).eval()
    acoustic, frames, text, tokens = make_batch()
    ids = torch.arange(12).view(3, 4)
    among_batch = transfer.diagnostics(acoustic, frames, text, tokens, ids)
    transfer.set_candidates(text[0, :1], ids[0, :1])
    alone = transfer.diagnostics(acoustic, frames, text, tokens, torch.zeros_like(ids))
    assert alone["retrieval_top1"] == alone["retrieval_top1_mismatched"] == 1
    assert among_batch["retrieval_top1"] < 1
    assert not any(key.startswith("candidate") for key in transfer.state_dict())


def test_feedback_adapter_starts_as_nothing_and_learns():
    adapter = FeedbackAdapter(6, width=3)
    acoustic = torch.randn(2, 7, 6)
    assert torch.equal(adapter(acoustic), acoustic)
    adapter(acoustic).square().sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="feedback.width"):
        FeedbackAdapter(6, width=0)
