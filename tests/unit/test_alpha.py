"""The weight of the transfer beside the enhancement loss: fixed, scheduled, balanced."""

import math

import pytest
import torch

from cmkt.transfer.alpha import build_alpha

SE, CMA = torch.tensor(2.0), torch.tensor(4.0)


def test_fixed_alpha_by_hand():
    alpha = build_alpha(0.25)
    assert alpha(SE, CMA) == 3.5
    assert alpha(SE, CMA, None, 0.7) == 3.5
    assert build_alpha({"schedule": "fixed", "alpha": 0.25})(SE, CMA) == 3.5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [  # at progress 0, 0.125, 0.25, 0.5 and 1, with `until` 0.5
        ("fixed", (0.8, 0.8, 0.8, 0.8, 0.8)),
        ("warmup", (1.0, 0.95, 0.9, 0.8, 0.8)),
        ("decay", (0.8, 0.85, 0.9, 1.0, 1.0)),
        ("cosine", (0.8, 0.9 - 0.1 * math.sqrt(0.5), 0.9, 1.0, 1.0)),
    ],
)
def test_schedules_by_hand(schedule, expected):
    alpha = build_alpha({"schedule": schedule, "alpha": 0.8, "until": 0.5})
    for progress, a in zip((0, 0.125, 0.25, 0.5, 1), expected, strict=True):
        assert alpha.weights(progress) == pytest.approx((a, 1 - a))
        loss = alpha(SE, CMA, None, progress)
        assert loss.item() == pytest.approx(a * 2 + (1 - a) * 4)


def test_only_alpha_of_1_is_off():
    for conf in (1, 1.0, {"schedule": "warmup", "alpha": 1}):
        assert build_alpha(conf).is_off
    for conf in (0.99, 0, {"schedule": "decay", "alpha": 0.5}, {"schedule": "balanced"}):
        assert not build_alpha(conf).is_off


# Balanced gradients


class Toy(torch.nn.Module):
    """A linear layer whose output is tapped; the gradients of both losses there are known."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(3, 4)
        self.x = torch.randn(5, 3)

    def losses(self, of_se=1.0, of_cma=1.0):
        """Return L_SE and L_CMA with gradient norms 2 `of_se` and 2 `of_cma` at the tap, (1, 4)."""
        tap = self.layer(self.x)[:1]
        return of_se * tap.sum(), of_cma * (tap * torch.tensor([1.0, -1, 1, -1])).sum(), [tap]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_balanced_transfer_has_its_share_of_the_gradient(share):
    alpha, toy = build_alpha({"schedule": "balanced", "share": share}), Toy()
    loss_se, loss_cma, stream = toy.losses(3.0, 0.01)
    total = alpha(loss_se, loss_cma, stream)
    assert alpha.weights(0.0)[1].item() == pytest.approx(share / (1 - share) * 300, rel=1e-5)
    assert all(p.grad is None for p in toy.parameters())  # measuring leaves no trace
    norms = []
    for weight, loss in zip(alpha.weights(0.0), (loss_se, loss_cma), strict=True):
        (gradient,) = torch.autograd.grad(weight * loss, stream, retain_graph=True)
        norms.append(gradient.norm().item())
    assert norms[1] / sum(norms) == pytest.approx(share, rel=1e-5)
    total.backward()
    expected = alpha.weights(0.0)[1] * loss_cma + loss_se
    assert torch.allclose(total, expected)
    assert toy.layer.weight.grad.isfinite().all()


def test_balanced_over_several_taps():
    """Of two taps with gradients (3, 0) and (4, 0) the norm is 5, and the transfer's is 1."""
    first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    alpha = build_alpha({"schedule": "balanced"})
    alpha(3 * first[0] + 4 * second[0], second[1], [first, second])
    assert alpha.weights(0.0)[1].item() == pytest.approx(5)


def test_measured_every_few_training_steps_and_smoothed_in_the_logarithm():
    alpha = build_alpha({"schedule": "balanced", "every": 3, "smoothing": 0.75})
    seen = []
    for step in range(7):
        alpha(*Toy().losses(1.0 if step < 2 else 16.0))
        seen.append(round(alpha.weights(0.0)[1].item(), 3))
    assert seen == [1, 1, 1, 2, 2, 2, round(2**0.75 * 16**0.25, 3)]


def test_evaluation_and_batches_without_text_keep_the_weight():
    alpha = build_alpha({"schedule": "balanced", "every": 1})
    # Nothing is measured yet, and a batch without text changes that not: L_CMA is 0 anyway.
    loss_se, loss_cma, stream = Toy().losses()
    assert alpha(loss_se, 0 * loss_cma, stream) == loss_se
    assert alpha(loss_se, loss_cma.detach(), stream) == loss_se
    alpha(*Toy().losses(5.0))
    for of_cma in (0.0, math.nan, math.inf):
        alpha(*Toy().losses(1.0, of_cma))
        assert alpha.weights(0.0)[1].item() == pytest.approx(5)
    alpha.eval()
    loss_se, loss_cma, stream = Toy().losses(1.0, 100.0)
    assert torch.allclose(alpha(loss_se, loss_cma), loss_se + 5 * loss_cma)
    with torch.no_grad():
        alpha.train()(loss_se, loss_cma)
    assert alpha.weights(0.0)[1].item() == pytest.approx(5)


def test_first_batch_without_text_does_not_put_the_measurement_off():
    alpha = build_alpha({"schedule": "balanced", "every": 100})
    alpha(*Toy().losses(5.0, 0.0))
    assert alpha.weights(0.0)[1] == 0
    alpha(*Toy().losses(5.0))
    assert alpha.weights(0.0)[1].item() == pytest.approx(5)


def test_resumed_equals_uninterrupted():
    conf = {"schedule": "balanced", "every": 4}
    whole, first, second = (build_alpha(conf) for _ in range(3))
    weights = []
    for step in range(10):
        losses = [Toy(step).losses(1.0 + step) for _ in range(2)]
        whole(*losses[0])
        (first if step < 6 else second)(*losses[1])
        if step == 5:
            second.load_state_dict(first.state_dict())
        weights.append(whole.weights(0.0)[1].item())
    assert second.weights(0.0)[1] == whole.weights(0.0)[1]
    assert len(set(weights)) == 3


def test_two_forwards_before_one_backward():
    """Accumulated losses: the second measurement must not spoil the first one's graph."""
    alpha, toy = build_alpha({"schedule": "balanced", "every": 1}), Toy()
    (alpha(*toy.losses()) + alpha(*toy.losses(9.0))).backward()
    assert toy.layer.weight.grad.isfinite().all()


def test_balanced_works_in_half_precision():
    """Gradients of 1e-8 would be 0 in float16."""
    alpha = build_alpha({"schedule": "balanced"})
    tap = torch.ones(4, dtype=torch.float16, requires_grad=True)
    alpha(tap.float().sum() * 3e-8, tap.float().sum() * 1e-7, [tap])
    assert alpha.weights(0.0)[1].item() == pytest.approx(0.3, rel=0.02)


def test_balanced_without_the_tap_says_what_is_missing():
    with pytest.raises(ValueError, match="balanced needs the tapped tensors"):
        build_alpha({"schedule": "balanced"})(SE, CMA)


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        (1.5, "alpha must be a number of at least 0 and at most 1, not 1.5"),
        (-0.1, "alpha must be"),
        (math.nan, "alpha must be"),
        ("half", "alpha must be .*'half'"),
        (True, "alpha must be"),
        (None, "alpha must be"),
        ({}, "alpha.schedule must be one of fixed, warmup, decay, cosine, balanced, not None"),
        ({"schedule": "warm_up"}, "alpha.schedule .*did you mean warmup"),
        ({"schedule": "decay", "alpha": 2}, "alpha must be .*not 2"),
        ({"schedule": "decay", "until": 0}, "alpha.until must be a number of above 0"),
        ({"schedule": "decay", "until": 1.5}, "alpha.until"),
        ({"schedule": "decay", "share": 0.5}, "alpha .decay.: unknown key share"),
        ({"schedule": "balanced", "share": 1}, "alpha.share"),
        ({"schedule": "balanced", "share": 0}, "alpha.share"),
        ({"schedule": "balanced", "every": 0}, "alpha.every"),
        ({"schedule": "balanced", "smoothing": 1}, "alpha.smoothing"),
        ({"schedule": "balanced", "alpha": 0.5}, "alpha .balanced.: unknown key alpha"),
    ],
)
def test_wrong_settings_are_named(conf, words):
    with pytest.raises(ValueError, match=words):
        build_alpha(conf)
