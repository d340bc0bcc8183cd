"""Optimal transport that keeps the order of time."""

import torch

from cmkt.transfer.alignment.base import Inputs
from cmkt.transfer.alignment.transport import Sinkhorn
from cmkt.transfer.sequences import order_distance
from cmkt.transfer.settings import number


class TemporalOrderTransport(Sinkhorn):
    """Optimal transport with a kernel exp(-C / eps) exp(-d^2 / (2 sigma^2)).

    d_ij is how far frame j is from token i's place in time (see `order_distance`), about in token
    lengths (Lu et al. 2409.02239). A word said twice gets, both times, the frames near its place.

    Args:
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        width: width inside.
        eps: weight of the entropy, see `Sinkhorn`.
        iterations: of the solver.
        sigma: width of the prior, in token lengths.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(
        self,
        acoustic_dim: int,
        linguistic_dim: int,
        width: int = 128,
        eps: float = 0.1,
        iterations: int = 60,
        sigma: float = 2.0,
    ):
        super().__init__(acoustic_dim, linguistic_dim, width, eps, iterations)
        self.sigma = number("alignment.sigma", sigma, 0.01)

    def log_prior(self, inputs: Inputs) -> torch.Tensor:
        """Return -d^2 / (2 sigma^2), (B, T_t, T_a)."""
        tokens, frames = inputs.text.shape[1], inputs.acoustic.shape[1]
        distance = order_distance(inputs.token_lengths, tokens, inputs.frame_lengths, frames)
        return -distance / (2 * self.sigma**2)
