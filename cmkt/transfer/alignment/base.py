"""What every alignment is given and returns."""

from typing import NamedTuple

import torch
from torch import nn

from cmkt.transfer.sequences import lengths_to_mask


class Aligned(NamedTuple):
    """The acoustic side, one vector for each token.

    Args:
        zhat: (B, T_t, D_t), in the space of the token embeddings.
        weights: (B, T_t, T_a), which frames a token is made of; the rows of valid tokens sum to 1
            and are 0 in the padding. None unless `need_weights`.
        loss: (B,), what the alignment itself is trained with, if it is.
        cost: (B,), cost of the transport plan, of an alignment that has one.
    """

    zhat: torch.Tensor
    weights: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    cost: torch.Tensor | None = None


class Inputs(NamedTuple):
    """The two sides of a batch, on one device, in float32, with zeros in the padding.

    Args:
        acoustic: (B, T_a, D_a).
        frame_lengths: (B,) valid frames.
        frames: (B, T_a), true for these.
        text: (B, T_t, D_t).
        token_lengths: (B,) valid tokens.
        tokens: (B, T_t), true for these.
        token_ids: (B, T_t), one number for each word or piece of a word, where they are known;
            anything in the padding.
    """

    acoustic: torch.Tensor
    frame_lengths: torch.Tensor
    frames: torch.Tensor
    text: torch.Tensor
    token_lengths: torch.Tensor
    tokens: torch.Tensor
    token_ids: torch.Tensor | None


class Alignment(nn.Module):
    """An alignment, built as `Kind(acoustic_dim, linguistic_dim, **settings)`.

    A kind implements `align(inputs, need_weights)` and says what it can do: `uses_text` (false:
    zhat does not depend on what the embeddings are), `has_cost` (it has a transport plan's cost).
    """

    uses_text = has_cost = False

    def forward(
        self,
        acoustic: torch.Tensor,
        acoustic_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        need_weights: bool = False,
    ) -> Aligned:
        """Align.

        Args:
            acoustic: (B, T_a, D_a), with anything in the padding, even NaN.
            acoustic_lengths: (B,) valid frames.
            text: (B, T_t, D_t), with anything in the padding.
            text_lengths: (B,) valid tokens.
            token_ids: (B, T_t), which token each is, for an alignment that must know.
            need_weights: also return which frames a token is made of.
        """
        # Half precision would lose the small differences that the cosine is made of.
        with torch.autocast(acoustic.device.type, enabled=False):
            frame_lengths = acoustic_lengths.to(acoustic.device)
            token_lengths = text_lengths.to(acoustic.device)
            frames = lengths_to_mask(frame_lengths, acoustic.shape[1])
            tokens = lengths_to_mask(token_lengths, text.shape[1])
            # Zeros in the padding: a NaN there would pass through a weight of 0.
            acoustic = acoustic.float().masked_fill(~frames[..., None], 0.0)
            text = text.float().masked_fill(~tokens[..., None], 0.0)
            sides = (acoustic, frame_lengths, frames, text, token_lengths, tokens)
            return self.align(Inputs(*sides, token_ids), need_weights)
