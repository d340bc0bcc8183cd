"""The feedback adapter: what the text has taught becomes a part of the enhancement model."""

import torch
from torch import nn

from cmkt.transfer.settings import whole


class FeedbackAdapter(nn.Module):
    """A small bottleneck beside the acoustic stream: h' = h + U v, v = V LayerNorm(h).

    The alignment acts on v, frame by frame, and U brings v back into the stream. U is 0 at
    first, so that training starts at the enhancement model without the adapter. The form is that of
    the adapters of Houlsby et al. 2019 (arXiv 1902.00751), without their nonlinearity, so that what
    is aligned is what is fed back.

    Args:
        acoustic_dim: D_a, width of the acoustic stream.
        width: of v.

    Raises:
        ValueError: `width` is no whole number above 0.
    """

    def __init__(self, acoustic_dim: int, width: int = 32):
        super().__init__()
        whole("feedback.width", width, 1)
        self.norm = nn.LayerNorm(acoustic_dim)
        self.down = nn.Linear(acoustic_dim, width)
        self.up = nn.Linear(width, acoustic_dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, acoustic: torch.Tensor) -> torch.Tensor:
        """Return the stream (B, T_a, D_a) with v added; `down` makes v (B, T_a, width)."""
        return acoustic + self.up(self.down(self.norm(acoustic)))
