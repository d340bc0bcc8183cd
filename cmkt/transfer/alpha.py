"""How much the transfer loss counts beside the enhancement loss."""

import math

import torch
from torch import nn

from cmkt.transfer.diagnostics import gradient_norm
from cmkt.transfer.distributed import total_norm
from cmkt.transfer.settings import build_part, choice, number, whole

# What is left of the transfer's weight 1 - alpha when the share q of the schedule is over.
SCHEDULES = {
    "fixed": lambda q: 1.0,
    "warmup": lambda q: q,
    "decay": lambda q: 1 - q,
    "cosine": lambda q: (1 + math.cos(math.pi * q)) / 2,
}


class ScheduledAlpha(nn.Module):
    """L = a L_SE + (1 - a) L_CMA (Hung et al. 2025, arXiv 2503.07078), 1 - a = (1 - alpha) s(q).

    q = min(progress / until, 1) is the share of the schedule that is over, and s is

    - `fixed`: 1;
    - `warmup`: q, from the enhancement loss alone to alpha;
    - `decay`: 1 - q, from alpha to the enhancement loss alone;
    - `cosine`: (1 + cos(pi q)) / 2, as `decay` but along half a cosine.

    Args:
        schedule: `fixed`, `warmup`, `decay` or `cosine`.
        alpha: weight of the enhancement loss, in [0, 1].
        until: share of the training, above 0 and at most 1, after which the schedule is over.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(self, schedule: str, alpha: float = 0.9, until: float = 1.0):
        super().__init__()
        self.schedule = SCHEDULES[choice("alpha.schedule", schedule, SCHEDULES)]
        self.alpha = number("alpha", alpha, 0, 1)
        self.until = number("alpha.until", until, 0, 1, above=True)

    @property
    def is_off(self) -> bool:
        """Whether the text cannot matter."""
        return self.alpha == 1

    def weights(self, progress: float) -> tuple[float, float]:
        """Return the weights of L_SE and L_CMA when this share of the training is over."""
        transfer = (1 - self.alpha) * self.schedule(min(progress / self.until, 1.0))
        return 1 - transfer, transfer

    def forward(
        self,
        loss_se: torch.Tensor,
        loss_cma: torch.Tensor,
        stream: list[torch.Tensor] | None = None,
        progress: float = 0.0,
    ) -> torch.Tensor:
        """Return the weighted sum; `stream` is for `BalancedGradients` alone."""
        of_se, of_cma = self.weights(progress)
        return of_se * loss_se + of_cma * loss_cma


class BalancedGradients(nn.Module):
    """L = L_SE + w L_CMA, so that the transfer has a fixed share of the gradient at the tap.

    With the norms of both losses' gradients at the tapped tensors,
    w = share / (1 - share) |g_SE| / |g_CMA|. It is measured in training only, smoothed, and kept in
    the checkpoint; a batch without text leaves it as it is.

    Args:
        share: w |g_CMA| / (|g_SE| + w |g_CMA|), above 0 and at most 0.99.
        every: training steps from one measurement to the next; each costs two backward passes from
            the losses to the tap.
        smoothing: how much of log w stays at a new measurement, from 0 (none) to 0.99.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    is_off = False

    def __init__(self, share: float = 0.5, every: int = 10, smoothing: float = 0.9):
        super().__init__()
        self.share = number("alpha.share", share, 0, 0.99, above=True)
        self.every = whole("alpha.every", every, 1)
        self.smoothing = number("alpha.smoothing", smoothing, 0, 0.99)
        self.register_buffer("weight", torch.zeros(()))  # 0: not measured yet
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def weights(self, progress: float) -> tuple[float, torch.Tensor]:
        """Return the weights of L_SE and L_CMA: those measured last, at any progress."""
        # A copy, since the next measurement changes the buffer in place, perhaps before `backward`.
        return 1.0, self.weight.clone()

    def forward(
        self,
        loss_se: torch.Tensor,
        loss_cma: torch.Tensor,
        stream: list[torch.Tensor] | None = None,
        progress: float = 0.0,
    ) -> torch.Tensor:
        """Return the weighted sum.

        Args:
            loss_se: enhancement loss.
            loss_cma: transfer loss.
            stream: the tapped tensors, on which both losses depend.
            progress: of no effect.

        Raises:
            ValueError: there is no `stream` in training.
        """
        if self.training and torch.is_grad_enabled():
            if stream is None or len(stream) == 0:
                raise ValueError("alpha: the schedule balanced needs the tapped tensors (stream)")
            if self.steps % self.every == 0 or self.weight == 0:
                self._measure(loss_se, loss_cma, stream)
            self.steps += 1
        of_se, of_cma = self.weights(progress)
        return of_se * loss_se + of_cma * loss_cma

    def _measure(self, loss_se, loss_cma, stream) -> None:
        of_se, of_cma = (total_norm(gradient_norm(loss, stream)) for loss in (loss_se, loss_cma))
        weight = self.share / (1 - self.share) * of_se / of_cma
        if weight.isfinite() and weight > 0:
            kept = self.smoothing if self.weight > 0 else 0.0
            self.weight.copy_(self.weight**kept * weight ** (1 - kept))


def build_alpha(conf: float | dict) -> nn.Module:
    """Build what combines the two losses.

    Args:
        conf: alpha, or a mapping with `schedule` (`balanced`, or of `ScheduledAlpha`) and the
            settings of `BalancedGradients` or `ScheduledAlpha`.

    Returns:
        a module that is called as `ScheduledAlpha` and has its `is_off` and `weights`.

    Raises:
        ValueError: an unknown schedule or key, a value of the wrong type or outside its range.
    """
    if not isinstance(conf, dict):
        return ScheduledAlpha("fixed", conf)
    conf = dict(conf)
    schedule = choice("alpha.schedule", conf.pop("schedule", None), [*SCHEDULES, "balanced"])
    if schedule == "balanced":
        return build_part(BalancedGradients, "alpha (balanced)", conf)
    return build_part(ScheduledAlpha, f"alpha ({schedule})", conf, schedule)
