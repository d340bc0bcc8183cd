"""The losses of zhat: hand-computed values, what takes part and what does not."""

import math

import pytest
import torch
from torch.nn import functional as F

from cmkt.transfer.alignment import build_alignment
from cmkt.transfer.alignment.base import Aligned
from cmkt.transfer.losses import TransferLoss

EVERY = {
    "cosine": 1.0,
    "mse": 0.5,
    "contrastive": {"weight": 0.25, "level": "both"},
    "transport_cost": 2.0,
    "own": 0.1,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(lengths=(4, 3, 2)):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    zhat, text = torch.randn(2, len(lengths), max(lengths), 5)
    own, cost = torch.rand(2, len(lengths))
    return Aligned(zhat.requires_grad_(), None, own, cost), text, mask


def test_cosine_by_hand():
    text = torch.tensor([[[1.0, 0], [0, 2]], [[3, 0], [9, 9]], [[0, 0], [0, 0]]])
    zhat = torch.tensor([[[5.0, 0], [1, 1]], [[-1, 0], [1, 0]], [[1, 2], [3, 4]]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    first, second = 1 - math.sqrt(0.5), 2.0
    for reduction, expected in (("sum", first + second), ("mean", first / 2 + second)):
        loss, parts = TransferLoss("cosine", reduction)(Aligned(zhat), text, mask)
        assert loss.item() == pytest.approx(expected / 2, abs=1e-6)
        assert parts == {"cosine": loss}


def test_squared_error_by_hand():
    text = torch.tensor([[[1.0, 0], [0, 2]], [[3, 0], [9, 9]]])
    zhat = torch.tensor([[[3.0, 0], [1, 1]], [[3, 4], [0, 0]]])
    mask = torch.tensor([[True, True], [True, False]])
    for reduction, expected in (("sum", (2 + 1 + 8) / 2), ("mean", ((2 + 1) / 2 + 8) / 2)):
        loss, _ = TransferLoss("mse", reduction)(Aligned(zhat), text, mask)
        assert loss.item() == pytest.approx(expected)


def test_contrastive_by_hand():
    """Two orthogonal words; zhat is the first one twice, right once and wrong once."""
    text = torch.eye(2)[None]
    zhat = torch.tensor([[[2.0, 0], [5.0, 0]]])
    conf = {"contrastive": {"temperature": 1.0}}
    loss, _ = TransferLoss(conf, "sum")(Aligned(zhat), text, torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(2 * math.log(1 + math.e) - 1)


@pytest.mark.parametrize("ids", [True, False])
def test_contrastive_of_tokens_is_a_cross_entropy_among_all_tokens_of_the_batch(ids):
    aligned, text, mask = batch()
    token_ids = torch.arange(12).view(3, 4) if ids else None
    loss, _ = TransferLoss({"contrastive": {"temperature": 0.2}, "own": 0}, "sum")(
        aligned, text, mask, token_ids
    )
    similarity = F.cosine_similarity(aligned.zhat[mask][:, None], text[mask][None], dim=-1)
    expected = F.cross_entropy(similarity / 0.2, torch.arange(9), reduction="sum") / 3
    assert torch.allclose(loss, expected)


@pytest.mark.parametrize("ids", [True, False])
def test_tokens_of_the_same_word_are_no_negatives(ids):
    """Tokens 0 and 5 are the same word: neither is a wrong answer for the other."""
    aligned, text, mask = batch((3, 3))
    text[1, 2] = text[0, 0]
    token_ids = torch.tensor([[7, 1, 2], [3, 4, 7]]) if ids else None
    contrastive = TransferLoss({"contrastive": 1, "own": 0}, "sum")
    loss, _ = contrastive(aligned, text, mask, token_ids)
    logits = F.cosine_similarity(aligned.zhat.view(6, 1, 5), text.view(1, 6, 5), dim=-1) / 0.1
    logits[0, 5] = logits[5, 0] = -math.inf
    assert torch.allclose(loss, F.cross_entropy(logits, torch.arange(6), reduction="sum") / 2)
    if ids:
        different, _ = contrastive(aligned, text, mask, torch.arange(6).view(2, 3))
        assert different > loss + 0.01


def test_contrastive_of_utterances_compares_their_means_in_both_directions():
    aligned, text, mask = batch((4, 3, 2, 4))
    text[3] = text[0]  # the same transcript: no negative
    conf = {"contrastive": {"temperature": 0.3, "level": "utterance"}, "own": 0}
    zhat, z = (
        torch.stack([x[n, : mask[n].sum()].mean(0) for n in range(4)]) for x in (aligned.zhat, text)
    )
    logits = F.cosine_similarity(zhat[:, None], z[None], dim=-1) / 0.3
    logits[0, 3] = logits[3, 0] = -math.inf
    there, back = (F.cross_entropy(x, torch.arange(4)) for x in (logits, logits.T))
    for reduction in ("mean", "sum"):
        loss, _ = TransferLoss(conf, reduction)(aligned, text, mask)
        assert torch.allclose(loss, (there + back) / 2)


def test_both_levels_are_the_sum():
    aligned, text, mask = batch()
    token, utterance, both = (
        TransferLoss({"contrastive": {"level": level}, "own": 0})(aligned, text, mask)[0]
        for level in ("token", "utterance", "both")
    )
    assert torch.allclose(both, token + utterance)


@pytest.mark.parametrize("level", ["token", "utterance", "both"])
def test_nothing_to_tell_apart_is_zero(level):
    aligned, text, mask = batch((1,))
    loss, _ = TransferLoss({"contrastive": {"level": level}, "own": 0})(aligned, text, mask)
    loss.backward()
    assert loss == 0
    assert aligned.zhat.grad.eq(0).all()


def test_contrastive_training_makes_each_token_nearest_to_its_own_word():
    text = torch.randn(2, 6, 16) + 2  # a large common mean, as embeddings of a language model
    zhat = torch.randn(2, 6, 16, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    optimizer = torch.optim.Adam([zhat], 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        TransferLoss("contrastive")(Aligned(zhat), text, mask)[0].backward()
        optimizer.step()
    nearest = F.cosine_similarity(zhat.view(12, 1, 16), text.view(1, 12, 16), dim=-1).argmax(1)
    assert nearest.tolist() == list(range(12))


def test_weighted_sum_and_unweighted_parts():
    aligned, text, mask = batch()
    loss, parts = TransferLoss(EVERY)(aligned, text, mask)
    assert set(parts) == set(EVERY)
    assert not any(part.requires_grad for part in parts.values())
    weights = {"cosine": 1.0, "mse": 0.5, "contrastive": 0.25, "transport_cost": 2.0, "own": 0.1}
    expected = sum(weights[name] * part for name, part in parts.items())
    assert torch.allclose(loss, expected)
    assert torch.allclose(parts["own"], aligned.loss.mean())
    assert torch.allclose(parts["transport_cost"], aligned.cost.mean())
    alone, _ = TransferLoss({"mse": 1, "own": 0})(aligned, text, mask)
    assert torch.allclose(alone, parts["mse"])


def test_own_loss_is_added_where_there_is_one():
    aligned, text, mask = batch()
    with_own, parts = TransferLoss("cosine")(aligned, text, mask)
    assert torch.allclose(with_own, parts["cosine"] + aligned.loss.mean())
    without, parts = TransferLoss("cosine")(Aligned(aligned.zhat), text, mask)
    assert list(parts) == ["cosine"]
    assert torch.allclose(without, with_own - aligned.loss.mean())


@pytest.mark.parametrize("rubbish", [5.0, math.nan, math.inf])
def test_what_is_masked_takes_no_part(rubbish):
    """Padding, and an utterance without text, may hold anything: value and gradient stay."""
    aligned, text, mask = batch((4, 3, 2, 1))
    ids = torch.arange(16).view(4, 4)
    mask[3] = False
    few = Aligned(*(None if x is None else x[:3] for x in aligned))
    expected, _ = TransferLoss(EVERY)(few, text[:3], mask[:3], ids[:3])
    (expected_gradient,) = torch.autograd.grad(expected, aligned.zhat)
    zhat = aligned.zhat.detach().clone()
    zhat[~mask] = text[~mask] = rubbish
    own, cost = aligned.loss.clone(), aligned.cost.clone()
    own[3] = cost[3] = rubbish
    ids[~mask] = -1
    zhat.requires_grad_()
    loss, _ = TransferLoss(EVERY)(Aligned(zhat, None, own, cost), text, mask, ids)
    loss.backward()
    assert torch.allclose(loss, expected)
    assert torch.allclose(zhat.grad, expected_gradient)
    assert zhat.grad[~mask].eq(0).all()


@pytest.mark.parametrize("conf", [*EVERY, EVERY])
def test_batch_without_text_is_zero_and_still_attached(conf):
    aligned, text, mask = batch()
    own, cost = (torch.rand(3, requires_grad=True) for _ in range(2))
    aligned = aligned._replace(loss=own, cost=cost)
    loss, _ = TransferLoss(conf)(aligned, text, mask & False)
    loss.backward()
    assert loss == 0
    assert aligned.zhat.grad.eq(0).all() and own.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_loss_in_float32(dtype):
    aligned, text, mask = batch()
    expected, _ = TransferLoss(EVERY)(aligned, text, mask)
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = TransferLoss(EVERY)(aligned, text, mask)
    assert loss.dtype == torch.float32
    assert loss == expected


def test_transport_cost_needs_a_plan():
    words = "transport_cost needs an optimal-transport alignment"
    loss = TransferLoss({"cosine": 1.0, "transport_cost": 0.1})
    for kind in ("transformer", "integrate_and_fire", "ctc"):
        alignment = build_alignment({"type": kind}, 6, 5, 8)
        TransferLoss("cosine").check(alignment)
        with pytest.raises(ValueError, match=words):
            loss.check(alignment)
    for kind in ("sinkhorn", "temporal_order", "unbalanced", "gromov_wasserstein"):
        loss.check(build_alignment({"type": kind}, 6, 5))
    aligned, text, mask = batch()
    with pytest.raises(ValueError, match=words):
        loss(aligned._replace(cost=None), text, mask)


def test_own_loss_alone_needs_one():
    aligned, text, mask = batch()
    assert TransferLoss("own")(aligned, text, mask)[0] == aligned.loss.mean()
    with pytest.raises(ValueError, match="loss.own alone needs an alignment"):
        TransferLoss("own")(Aligned(aligned.zhat), text, mask)


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ("cosin", "loss must be one of cosine, .*'cosin'; did you mean cosine"),
        (["cosine"], "loss must be one of"),
        ({}, "loss names none of cosine"),
        ({"contrast": 1}, "loss: unknown key contrast .*did you mean contrastive"),
        ({"cosine": -1}, "loss.cosine.weight must be a number of at least 0, not -1"),
        ({"cosine": "much"}, "loss.cosine.weight .*'much'"),
        ({"cosine": {"weight": True}}, "loss.cosine.weight"),
        ({"cosine": {"temperature": 1}}, "loss.cosine: unknown key temperature"),
        ({"contrastive": {"temperature": 0}}, "loss.contrastive.temperature .*above 0"),
        ({"contrastive": {"temperature": -0.1}}, "loss.contrastive.temperature"),
        ({"contrastive": {"level": "word"}}, "loss.contrastive.level .*token, utterance, both"),
        ({"contrastive": {"temprature": 1}}, "loss.contrastive: .*did you mean temperature"),
    ],
)
def test_wrong_settings_are_named(conf, words):
    with pytest.raises(ValueError, match=words):
        TransferLoss(conf)


def test_wrong_reduction_is_named():
    with pytest.raises(ValueError, match="reduction must be one of mean, sum"):
        TransferLoss("cosine", "max")
