"""Optimal transport that also compares the structure within either side."""

import torch
from torch.nn import functional as F

from cmkt.transfer.alignment.transport import Frames, Pairs, Sinkhorn, Solution, solve
from cmkt.transfer.settings import number, whole


class Sides:
    """The distances D within the text and E within the frames of a batch.

    E = 1 - unit gram unit^T is never made: its rank is that of the projection.

    Args:
        text: (B, T_t, D_t).
        frames: the projected frames.
    """

    def __init__(self, text: torch.Tensor, frames: Frames):
        text = F.normalize(text, dim=-1)
        self.of_tokens = 1 - text @ text.transpose(1, 2)  # D, (B, T_t, T_t)
        self.unit, self.gram = frames.unit, frames.basis.T @ frames.basis

    def crossed(self, plan: torch.Tensor) -> torch.Tensor:
        """Return D g E (B, T_t, T_a)."""
        left = self.of_tokens @ plan
        return left.sum(2, keepdim=True) - (left @ self.unit) @ self.gram @ self.unit.mT

    def difference(self, plan: torch.Tensor) -> torch.Tensor:
        """Return sum_ijkl (D_ik - E_jl)^2 g_ij g_kl (B,), the square multiplied out."""
        tokens, frames = plan.sum(2, keepdim=True), plan.sum(1)[:, :, None]  # (B, T, 1)
        of_tokens = (tokens.mT @ self.of_tokens**2 @ tokens)[:, 0, 0]
        mean = frames.mT @ self.unit  # (B, 1, width + 1)
        moment = (self.unit * frames).mT @ self.unit @ self.gram  # (B, width + 1, width + 1)
        of_frames = frames.sum((1, 2)) ** 2 - 2 * (mean @ self.gram @ mean.mT)[:, 0, 0]
        of_frames = of_frames + (moment * moment.mT).sum((1, 2))
        return of_tokens + of_frames - 2 * (self.crossed(plan) * plan).sum((1, 2))


class FusedGromovWasserstein(Sinkhorn):
    """Match tokens with frames, and pairs of tokens with pairs of frames.

    Minimises (1 - structure) <g, C> + structure sum_ijkl (D_ik - E_jl)^2 g_ij g_kl + eps KL, with
    D = 1 - cos within the text, E = 1 - cos within the projected frames (Lu et al. 2505.13079),
    by Peyre et al. 2016: `steps` times the structural term is made linear at the last plan and the
    entropic problem solved, from the last potentials on. The first plan is a b^T. `cost` is the
    two terms without the entropy.

    The square is multiplied out into products of matrices, and E has rank `width` + 1, so no
    matrix is larger than T_t x T_a or T_t x T_t.

    Args:
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        width: width inside.
        eps: weight of the entropy, see `Sinkhorn`.
        iterations: of the solver, in each step.
        structure: weight of the structural term, 0 (none) to 1 (nothing else).
        steps: how often the structural term is made linear.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(
        self,
        acoustic_dim: int,
        linguistic_dim: int,
        width: int = 128,
        eps: float = 0.1,
        iterations: int = 30,
        structure: float = 0.5,
        steps: int = 5,
    ):
        super().__init__(acoustic_dim, linguistic_dim, width, eps, iterations)
        self.structure = number("alignment.structure", structure, 0, 1)
        self.steps = whole("alignment.steps", steps, 1)

    def transport(
        self, text: torch.Tensor, frames: Frames, prior, real: Pairs
    ) -> tuple[Solution, torch.Tensor]:
        """Return the plan, without gradient, and its cost (B,); arguments as `Sinkhorn`."""
        distance = 1 - frames.cosines(text)  # C, (B, T_t, T_a)
        sides = Sides(text, frames)
        n, m = real.sizes()
        plan, potential = real.both() / (n * m)[:, :, None], None
        with torch.no_grad():
            for _ in range(self.steps):
                # What depends on the token or the frame alone is left to the potentials.
                linear = (1 - self.structure) * distance - 4 * self.structure * sides.crossed(plan)
                scores = prior - linear / self.eps
                solution = solve(scores, real, self.iterations, potential=potential)
                plan, potential = solution.plan(), solution.potential
        alike = (distance * plan).sum((1, 2))
        return solution, (1 - self.structure) * alike + self.structure * sides.difference(plan)
