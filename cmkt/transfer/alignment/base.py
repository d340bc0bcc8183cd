"""What every alignment is given and returns.

An alignment is an `nn.Module`, built as `Kind(acoustic_dim, linguistic_dim, **settings)` and called
as

    aligned = alignment(acoustic, acoustic_lengths, text, text_lengths, token_ids=None,
                        need_weights=False)

with acoustic (B, T_a, D_a), acoustic_lengths (B,), text (B, T_t, D_t), text_lengths (B,) and, where
known, token_ids (B, T_t), one number for each word or piece of a word. Padding holds anything, even
NaN. It runs in float32, also under autocast.

Two attributes say what it can do: `uses_text` (false: zhat does not depend on what the embeddings
are) and `has_cost` (it returns the cost of a transport plan).
"""

from typing import NamedTuple

import torch


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
