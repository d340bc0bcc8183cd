"""Optimal transport that may leave frames out."""

from cmkt.transfer.alignment.transport import Sinkhorn
from cmkt.transfer.settings import number


class UnbalancedTransport(Sinkhorn):
    """Optimal transport whose marginals are wished for, not forced.

    Minimises <g, C> + eps KL(g | a b^T) + token_penalty KL(g 1 | a) + frame_penalty KL(g^T 1 | b),
    the penalties in units of C (Lu et al. 2509.05609; Chizat et al. 2018): with a large
    `token_penalty` every token is grounded, with a small `frame_penalty` frames of noise or
    silence, which no token is near to, stay free. 0 for the frames is softmax attention.

    Args:
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        width: width inside.
        eps: weight of the entropy, see `Sinkhorn`.
        iterations: of the solver.
        token_penalty: of a token's mass differing from 1 / n.
        frame_penalty: of a frame's mass differing from 1 / m.

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
        token_penalty: float = 10.0,
        frame_penalty: float = 0.1,
    ):
        super().__init__(acoustic_dim, linguistic_dim, width, eps, iterations)
        number("alignment.token_penalty", token_penalty, 0, above=True)
        number("alignment.frame_penalty", frame_penalty, 0)
        self.strengths = tuple(p / (p + self.eps) for p in (token_penalty, frame_penalty))
