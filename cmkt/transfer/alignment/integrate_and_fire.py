"""Continuous integrate-and-fire: frames are added up until there is enough of them for a token."""

import torch
from torch import nn
from torch.nn import functional as F

from cmkt.transfer.alignment.base import Aligned, Alignment, Inputs
from cmkt.transfer.settings import whole

# A fresh module fires once in 1 + e^3 = 21 frames, about as often as speech has tokens.
LOGIT_AT_START = -3.0


def integrate(
    logits: torch.Tensor, valid: torch.Tensor, token_lengths: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Divide frames among tokens: all the weight is used up, and each token gets the same share.

    With c_j the sum of the scaled frame weights up to frame j, token i (from 0 on) gets of frame j
    the overlap of [c_{j-1}, c_j] with [i, i + 1] (Dong & Xu 1905.11235, section 3.1).

    Args:
        logits: (B, T_a), the weight of a frame is their sigmoid.
        valid: (B, T_a) frames.
        token_lengths: (B,) to which the weights are scaled.
        tokens: T_t.

    Returns:
        (B, T_t, T_a), the rows of valid tokens sum to 1; all 0 where no frame is valid.
    """
    # A softmax of logarithms scales without dividing by a sum that may be 0.
    lowest = torch.finfo(logits.dtype).min
    shares = F.logsigmoid(logits).masked_fill(~valid, lowest).softmax(-1) * valid  # (B, T_a)
    fired = shares.cumsum(-1)
    # Divided by what rounding has left of 1, so that the last token is complete.
    fired = fired / fired[:, -1:].detach().clamp(min=0.5) * token_lengths[:, None]
    steps = torch.arange(tokens, device=logits.device)[:, None]
    filled = (F.pad(fired, (1, 0))[:, None] - steps).clamp(0, 1)  # (B, T_t, 1 + T_a)
    # A sum that a GPU adds up in parallel may fall by a rounding error.
    return filled.diff(dim=-1).clamp(min=0)


class IntegrateAndFire(Alignment):
    """Make zhat by continuous integrate-and-fire.

    Dong & Xu, 1905.11235; for the transfer from a language model Deng et al., 2203.03582. Each
    frame has a weight in (0, 1), and a token fires whenever the weights have added up to 1. Scaled,
    they add up to the number of tokens T_t, which is all that the text says here: it cannot leak.

    The loss is the quantity loss |sum of the unscaled weights - T_t|, divided by T_t, since it is
    added to a loss per token and should not grow with the utterance.

    Args:
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        width: width inside.
        kernel: how many frames decide on the weight of the middle one; an odd number.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(self, acoustic_dim: int, linguistic_dim: int, width: int = 128, kernel: int = 3):
        super().__init__()
        whole("alignment.width", width, 1)
        if whole("alignment.kernel", kernel, 1) % 2 == 0:
            raise ValueError(f"alignment.kernel must be odd, not {kernel}")
        self.from_acoustic = nn.Sequential(
            nn.LayerNorm(acoustic_dim), nn.Linear(acoustic_dim, width)
        )
        self.context = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.to_logit = nn.Linear(width, 1)
        nn.init.constant_(self.to_logit.bias, LOGIT_AT_START)
        self.to_text = nn.Linear(width, linguistic_dim)

    def align(self, inputs: Inputs, need_weights: bool) -> Aligned:
        """Align; `loss` is the quantity loss."""
        outside = ~inputs.frames[..., None]
        # Masked again, or the last frames would see the padding's bias.
        frames = self.from_acoustic(inputs.acoustic).masked_fill(outside, 0.0)  # (B, T_a, width)
        context = F.gelu(self.context(frames.transpose(1, 2))).transpose(1, 2)
        logits = self.to_logit(context)[..., 0]  # (B, T_a)
        weights = integrate(logits, inputs.frames, inputs.token_lengths, inputs.text.shape[1])
        quantity = (logits.sigmoid() * inputs.frames).sum(-1)
        loss = (quantity - inputs.token_lengths).abs() / inputs.token_lengths.clamp(min=1)
        return Aligned(self.to_text(weights @ frames), weights if need_weights else None, loss)
