"""The cosine alignment loss and the diagnostics that tell transfer from leakage."""

import torch
from torch.nn import functional as F

from cmkt.transfer.alignment import lengths_to_mask


def text_mask(text: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
    """Return (B, T_t), true for real tokens; a zero vector stands for a missing transcript."""
    return lengths_to_mask(text_lengths.to(text.device), text.shape[1]) & text.ne(0).any(-1)


def cosines(zhat: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return cos(z_t, zhat_t) for each token (B, T_t), in float32."""
    return F.cosine_similarity(zhat.float(), text.float(), dim=-1, eps=1e-8)


def cosine_alignment_loss(
    zhat: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, reduction: str
) -> torch.Tensor:
    """L_CMA = sum (or mean) over the tokens of 1 - cos(z_t, zhat_t), mean over the utterances.

    Args:
        zhat: (B, T_t, D_t), made from the acoustic side.
        text: (B, T_t, D_t), targets.
        mask: (B, T_t), true for real tokens.
        reduction: `sum` as in the paper, or `mean` over an utterance's tokens.

    Returns:
        a scalar over the utterances that have text; 0, still attached to the graph, when none
        has, so that every parameter takes part in distributed training.
    """
    tokens = mask.sum(1)
    # Masked before the cosine: a NaN in the padding would reach the gradient through a weight of 0.
    zhat, text = (x.masked_fill(~mask[..., None], 0.0) for x in (zhat, text))
    total = ((1 - cosines(zhat, text)) * mask).sum(1)
    if reduction == "mean":
        total = total / tokens.clamp(min=1)
    return total.sum() / (tokens > 0).sum().clamp(min=1)


def mean_cosine(zhat: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine over the real tokens, a scalar."""
    return cosines(zhat, text)[mask].mean()
