"""What tells a transfer from a leak, and how an alignment looks."""

import torch
from torch.nn import functional as F

SCALE = 1024  # of a loss for its gradient, so that in float16 small ones do not become 0

# Names and order of what `CrossModalTransfer.diagnostics` returns.
DIAGNOSTICS = ("cos_matched", "retrieval_top1", "retrieval_top5", "cos_mismatched",
               "retrieval_top1_mismatched", "retrieval_top5_mismatched", "transfer_gap",
               "alignment_entropy", "alignment_monotonicity")  # fmt: skip


def retrieval(
    zhat: torch.Tensor,
    text: torch.Tensor,
    token_ids: torch.Tensor | None,
    candidates: torch.Tensor,
    candidate_ids: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Find each token among candidates by the cosine to what the acoustic side made of it.

    A token is found at rank r if r candidates of other words are nearer to zhat_t than z_t is.

    Args:
        zhat: (M, D_t), made from the acoustic side.
        text: (M, D_t), the token embeddings.
        token_ids: (M,), which token each is; None: equal embeddings are equal tokens.
        candidates: (N, D_t) token embeddings.
        candidate_ids: (N,); None where `token_ids` is.

    Returns:
        `top1` and `top5`, the shares of tokens at rank 0 and at a rank below 5.
    """
    scores = F.normalize(zhat, dim=-1) @ F.normalize(candidates, dim=-1).T  # (M, N)
    own = F.cosine_similarity(zhat, text, dim=-1)
    if token_ids is None or candidate_ids is None:
        same = torch.cdist(text, candidates) < 1e-4 * text.norm(dim=-1, keepdim=True)
    else:
        same = token_ids[:, None] == candidate_ids
    rank = ((scores > own[:, None]) & ~same).sum(1)
    return {"top1": (rank < 1).float().mean(), "top5": (rank < 5).float().mean()}


def entropy(weights: torch.Tensor, mask: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Return how spread the alignment is: 0 for one frame a token, 1 for all frames alike.

    Args:
        weights: (B, T_t, T_a), rows sum to 1.
        mask: (B, T_t), true for real tokens.
        frames: (B,) valid frames.

    Returns:
        a scalar: the mean over the tokens of -sum_j w_j log w_j / log(valid frames).
    """
    spread = torch.special.entr(weights).sum(-1) / frames.clamp(min=2).log()[:, None]
    return spread[mask].mean()


def monotonicity(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the share of tokens whose frames lie, in the mean, later than the token's before.

    Args:
        weights: (B, T_t, T_a), rows sum to 1.
        mask: (B, T_t), true for real tokens.

    Returns:
        a scalar in [0, 1]; NaN where no utterance has two tokens.
    """
    centres = weights @ torch.arange(weights.shape[2], device=weights.device).to(weights)
    later = centres.diff(dim=1) > 0  # (B, T_t - 1)
    return later[mask[:, 1:] & mask[:, :-1]].float().mean()


def gradient_norm(loss: torch.Tensor, stream: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of a loss's gradient at some tensors; 0 where it does not depend on them."""
    if not loss.requires_grad:
        return loss.new_zeros(())
    with torch.enable_grad():
        loss = SCALE * loss.sum()
    parts = torch.autograd.grad(loss, stream, retain_graph=True, allow_unused=True)
    squares = [part.float().square().sum() for part in parts if part is not None]
    return torch.stack(squares).sum().sqrt() / SCALE if squares else loss.new_zeros(())
