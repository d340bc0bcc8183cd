"""Optimal transport between tokens and frames: the solver, and the plain alignment made of it.

What is differentiated: not the plan. It is a constant in zhat, whose gradient goes through the
frames that are pooled. On words spoken in noise this trained as well as differentiating all
iterations did (the same cosine, gap and alignment; the gradients have a cosine of 0.9), and needs
no memory for them. Differentiating the last update alone, as in softmax attention, did worse. For
the `cost` a constant plan is exact: by the envelope theorem it is the gradient of the regularised
cost with respect to C.
"""

import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from cmkt.transfer.alignment.base import Aligned, Alignment, Inputs
from cmkt.transfer.settings import number, whole

NEVER = -1e30  # a score no frame is chosen with; finite, since -inf - -inf is NaN
FLOOR = -60.0  # e^-60 counts for nothing, and what is below e^-87 is slow on a CPU
ROUND = 15  # iterations before the scaling factors are moved into the potentials
RELAXATION = 1.5  # of 1 to 2: how far beyond the plain update to go
TOLERANCE = 0.02  # share of the mass at the wrong token that is worth a warning


class Pairs(NamedTuple):
    """Which tokens and frames are real, in the utterances that have both.

    Args:
        tokens: (B, T_t).
        frames: (B, T_a).
    """

    tokens: torch.Tensor
    frames: torch.Tensor

    @classmethod
    def of(cls, inputs: Inputs) -> "Pairs":
        """Make it for a batch."""
        both = ((inputs.token_lengths > 0) & (inputs.frame_lengths > 0))[:, None]
        return cls(inputs.tokens & both, inputs.frames & both)

    def both(self) -> torch.Tensor:
        """Return (B, T_t, T_a), true where token and frame are real."""
        return self.tokens[:, :, None] & self.frames[:, None, :]

    def sizes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers of tokens n and frames m, each (B, 1) and at least 1."""
        return tuple(x.sum(1, keepdim=True).clamp(min=1).float() for x in self)


class Solution(NamedTuple):
    """A plan g, by its rows.

    Args:
        weights: (B, T_t, T_a), the rows of g over their sums; 0 in the padding.
        mass: (B, T_t), the sums; in balanced transport 1 / n each.
        potential: (B, T_a), of the frames: weights_ij = softmax_j(scores_ij + potential_j).
        residual: (B,), mass that one more update of the tokens would move.
    """

    weights: torch.Tensor
    mass: torch.Tensor
    potential: torch.Tensor
    residual: torch.Tensor

    def plan(self) -> torch.Tensor:
        """Return g (B, T_t, T_a)."""
        return self.weights * self.mass[:, :, None]


def log_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return log sum e^x over a dimension (see `FLOOR`)."""
    top = x.amax(dim, keepdim=True)
    return (x - top).clamp_(min=FLOOR).exp_().sum(dim).log() + top.squeeze(dim)


@torch.no_grad()
def solve(
    scores: torch.Tensor,
    real: Pairs,
    iterations: int,
    token_strength: float = 1.0,
    frame_strength: float = 1.0,
    potential: torch.Tensor | None = None,
) -> Solution:
    """Find the plan of entropic transport between uniform marginals (Cuturi 2013).

    Minimises <g, C> + eps KL(g | a b^T) + rho_a KL(g 1 | a) + rho_b KL(g^T 1 | b), a_i = 1 / n,
    b_j = 1 / m, by the scaling iterations of Chizat et al. 2018. They are products with the kernel;
    every `ROUND` of them begins with an exact update in the log domain and ends with the factors
    moved into the potentials, so nothing underflows (Schmitzer 2019). Over-relaxed (Thibault et al.
    2021). The number of iterations is fixed: a GPU is never waited for.

    Args:
        scores: (B, T_t, T_a), -C / eps, plus the logarithm of a prior if there is one.
        real: which tokens and frames there are.
        iterations: updates of either side.
        token_strength: rho_a / (rho_a + eps), 1 for marginals that must be met.
        frame_strength: the same for the frames.
        potential: (B, T_a) of a similar problem, to start from.
    """
    tokens, frames = real
    n, m = real.sizes()
    token_share, frame_share = tokens / n, frames / m  # a (B, T_t) and b (B, T_a), 0 in the padding
    scores = scores.masked_fill(~real.both(), NEVER)

    def update_tokens(potential):
        mean = log_sum(scores + potential[:, None, :], 2) - m.log()
        return (-token_strength * mean).masked_fill(~tokens, 0.0), mean

    def update_frames(of_tokens):
        mean = log_sum(scores + of_tokens[:, :, None], 1) - n.log()
        return (-frame_strength * mean).masked_fill(~frames, 0.0)

    def relaxed(factor, sums, strength, decay):
        new = sums.clamp(min=1e-37).log().mul(-strength).sub(decay).clamp(-30.0, 30.0)
        return torch.lerp(factor, new, RELAXATION)

    if potential is None:
        potential = torch.zeros_like(frame_share)
    if not scores.numel():
        return Solution(scores, token_share, potential, scores.sum((1, 2)))
    for start in range(0, iterations, ROUND):
        of_tokens, _ = update_tokens(potential)
        potential = update_frames(of_tokens)
        kernel = scores + of_tokens[:, :, None] + potential[:, None, :]
        kernel = kernel.clamp_(min=FLOOR).exp_()  # (B, T_t, T_a)
        # With a penalty in place of a constraint, a part of the potential decays.
        token_decay = (1 - token_strength) * of_tokens
        frame_decay = (1 - frame_strength) * potential
        by_tokens, by_frames = torch.zeros_like(of_tokens), torch.zeros_like(potential)
        for _ in range(min(ROUND, iterations - start) - 1):
            sums = (kernel @ (by_frames.exp() * frame_share)[:, :, None])[:, :, 0]
            by_tokens = relaxed(by_tokens, sums, token_strength, token_decay)
            sums = ((by_tokens.exp() * token_share)[:, None, :] @ kernel)[:, 0]
            by_frames = relaxed(by_frames, sums, frame_strength, frame_decay)
        potential = (potential + by_frames).masked_fill(~frames, 0.0)
    before, _ = update_tokens(potential)
    potential = update_frames(before)
    of_tokens, mean = update_tokens(potential)
    mass = (of_tokens + mean).exp() * token_share
    residual = ((before + mean).exp() * token_share - mass).abs().sum(1)
    weights = (scores + potential[:, None, :]).softmax(2)
    # Subnormal numbers make products of matrices slow on a CPU.
    weights = weights.masked_fill(~real.both() | (weights < 1e-26), 0.0)
    return Solution(weights, mass, potential, residual)


class Frames(NamedTuple):
    """Frames f_j = basis inner_j in the text space, never made themselves: D_t may be thousands.

    Args:
        inner: (B, T_a, width + 1), the last one is 1.
        unit: (B, T_a, width + 1), the same of f_j / |f_j|.
        basis: (D_t, width + 1).
    """

    inner: torch.Tensor
    unit: torch.Tensor
    basis: torch.Tensor

    def cosines(self, text: torch.Tensor) -> torch.Tensor:
        """Return cos(z_i, f_j) (B, T_t, T_a)."""
        return (F.normalize(text, dim=-1) @ self.basis) @ self.unit.transpose(1, 2)

    def pooled(self, weights: torch.Tensor) -> torch.Tensor:
        """Return sum_j weights_ij f_j (B, T_t, D_t)."""
        return (weights @ self.inner) @ self.basis.T


class TextSpace(nn.Module):
    """Project acoustic frames into the text space, through a narrow layer."""

    def __init__(self, acoustic_dim: int, linguistic_dim: int, width: int):
        super().__init__()
        self.from_acoustic = nn.Sequential(
            nn.LayerNorm(acoustic_dim), nn.Linear(acoustic_dim, width)
        )
        self.to_text = nn.Linear(width, linguistic_dim)

    def forward(self, acoustic: torch.Tensor) -> Frames:
        """Project (B, T_a, D_a)."""
        inner = F.pad(self.from_acoustic(acoustic), (0, 1), value=1.0)
        basis = torch.cat([self.to_text.weight, self.to_text.bias[:, None]], 1)
        squared = ((inner @ (basis.T @ basis)) * inner).sum(-1, keepdim=True)  # |f_j|^2
        return Frames(inner, inner * squared.clamp(min=1e-12).rsqrt(), basis)


class Sinkhorn(Alignment):
    """Each token takes its share of the frames: entropic optimal transport.

    C_ij = 1 - cos(z_i, f_j), f_j the projected frames; g the plan between uniform marginals with
    entropy eps; zhat_i = sum_j g_ij f_j / sum_j g_ij (Lu et al. 2309.13650; as an attention,
    2309.16093). `weights` are the rows of g over their sums, `cost` is <g, C>.

    The plan is looked for with the text, so that the cosine of a wrong utterance rises too:
    judge it by `transfer_gap` (docs/method.md).

    Args:
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        width: width inside.
        eps: weight of the entropy, in units of C (0 to 2); small is sharp and converges slowly.
        iterations: of the solver; it warns, once, when they were too few.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    uses_text = has_cost = True

    def __init__(
        self,
        acoustic_dim: int,
        linguistic_dim: int,
        width: int = 128,
        eps: float = 0.1,
        iterations: int = 60,
    ):
        super().__init__()
        whole("alignment.width", width, 1)
        self.eps = number("alignment.eps", eps, 0.001)
        self.iterations = whole("alignment.iterations", iterations, 1)
        self.project = TextSpace(acoustic_dim, linguistic_dim, width)
        self.strengths = (1.0, 1.0)  # of the marginals, tokens and frames; see `solve`
        self.calls, self.warned = 0, False

    def log_prior(self, inputs: Inputs) -> torch.Tensor | float:
        """Return what is added to -C / eps, (B, T_t, T_a) or a number."""
        return 0.0

    def transport(
        self, text: torch.Tensor, frames: Frames, prior, real: Pairs
    ) -> tuple[Solution, torch.Tensor]:
        """Return the plan, without gradient, and its cost (B,), differentiable.

        Args:
            text: (B, T_t, D_t).
            frames: the projected frames.
            prior: as `log_prior` returns.
            real: which tokens and frames there are.
        """
        distance = 1 - frames.cosines(text)  # C, (B, T_t, T_a)
        scores = prior - distance.detach() / self.eps
        solution = solve(scores, real, self.iterations, *self.strengths)
        return solution, (solution.plan() * distance).sum((1, 2))

    def align(self, inputs: Inputs, need_weights: bool) -> Aligned:
        """Align; `cost` is that of the plan."""
        real = Pairs.of(inputs)
        frames = self.project(inputs.acoustic)
        solution, cost = self.transport(inputs.text, frames, self.log_prior(inputs), real)
        self._check(solution.residual)
        weights = solution.weights
        return Aligned(frames.pooled(weights), weights if need_weights else None, cost=cost)

    def _check(self, residual: torch.Tensor) -> None:
        """Warn once; looks at calls 1, 2, 4, 8 ... only, since looking waits for the GPU."""
        self.calls += 1
        if self.warned or self.calls & (self.calls - 1) or not len(residual):
            return
        worst = residual.max().item()
        if worst > TOLERANCE:
            self.warned = True
            warnings.warn(
                f"optimal transport has not converged: {worst:.1%} of the mass is at the wrong "
                f"token after {self.iterations} iterations with eps {self.eps:g}; raise "
                "alignment.iterations or alignment.eps",
                stacklevel=3,
            )
