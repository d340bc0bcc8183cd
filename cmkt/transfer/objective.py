"""Alignment, misalignment and loss in one module, for any training loop."""

import inspect

import torch
from torch import nn

from cmkt.transfer.alignment import CrossModalityTransformer
from cmkt.transfer.loss import cosine_alignment_loss, mean_cosine, text_mask
from cmkt.transfer.misalignment import Misalignment
from cmkt.transfer.targets import Targets


def _build(kind: type, name: str, conf: dict | None, *positional):
    conf = {} if conf is None else conf
    if not isinstance(conf, dict):
        raise ValueError(f"{name} must be a mapping, not {conf!r}")
    known = list(inspect.signature(kind).parameters)[len(positional) :]
    unknown = [key for key in conf if key not in known]
    if unknown:
        raise ValueError(f"{name}: unknown key {unknown[0]} (known: {', '.join(known)})")
    return kind(*positional, **conf)


class CrossModalTransfer(nn.Module):
    """L = alpha L_SE + (1 - alpha) L_CMA (Hung et al. 2025, arXiv 2503.07078).

    Args:
        acoustic_dim: D_a, width of the tapped acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        alpha: weight of the enhancement loss, in [0, 1].
        alignment: arguments of `CrossModalityTransformer`.
        misalignment: arguments of `Misalignment`.
        reduction: `mean` or `sum` over the tokens of an utterance.
        standardise: compare with embeddings of mean 0 and variance 1 in each dimension.
        pca: compare with this many principal components.

    `standardise` and `pca` need the statistics of the training set: `targets.set_statistics`.

    Raises:
        ValueError: an unknown key, a wrong type, a value outside its range.

    Convention: an utterance without a transcript has text of zeros (one row) and no loss.

    Example:
        transfer = CrossModalTransfer(acoustic_dim=256, linguistic_dim=384)
        loss_cma = transfer(hidden, frames, token_embeddings, tokens)
        transfer.combine(loss_se, loss_cma).backward()
    """

    def __init__(
        self,
        acoustic_dim: int,
        linguistic_dim: int,
        alpha: float = 0.9,
        alignment: dict | None = None,
        misalignment: dict | None = None,
        reduction: str = "mean",
        standardise: bool = False,
        pca: int | None = None,
    ):
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], not {alpha!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, not {reduction!r}")
        self.alpha, self.reduction = alpha, reduction
        self.targets = Targets(linguistic_dim, standardise, pca)
        self.alignment = _build(
            CrossModalityTransformer, "alignment", alignment, acoustic_dim, self.targets.dimension
        )
        self.misalignment = _build(Misalignment, "misalignment", misalignment)

    def forward(
        self,
        acoustic: torch.Tensor,
        acoustic_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Compute L_CMA.

        Args:
            acoustic: (B, T_a, D_a), gradients flow into it.
            acoustic_lengths: (B,) valid frames.
            text: (B, T_t, D_t) token embeddings; no gradient reaches them.
            text_lengths: (B,) valid tokens.

        Returns:
            a scalar (see `cosine_alignment_loss`).
        """
        text = text.detach()
        if text.shape[1] == 0:
            # Attention from no token would leave parameters without a gradient.
            text = text.new_zeros(len(text), 1, text.shape[2])
        mask = text_mask(text, text_lengths)
        text = self.targets(text)
        acoustic, target = self.misalignment(acoustic, acoustic_lengths, text, text_lengths)
        zhat, _ = self.alignment(acoustic, acoustic_lengths, text, text_lengths)
        return cosine_alignment_loss(zhat, target, mask, self.reduction)

    def combine(self, loss_se: torch.Tensor, loss_cma: torch.Tensor) -> torch.Tensor:
        """Return alpha L_SE + (1 - alpha) L_CMA."""
        return self.alpha * loss_se + (1 - self.alpha) * loss_cma

    @torch.no_grad()
    def diagnostics(
        self,
        acoustic: torch.Tensor,
        acoustic_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Tell transfer from leakage: compare with the acoustics of another utterance.

        Returns:
            `cos_matched`, `cos_mismatched` (acoustics rolled among the utterances with text) and
            their difference `transfer_gap`; empty when fewer than two utterances have text.
        """
        mask = text_mask(text, text_lengths)
        text = self.targets(text)
        acoustic_lengths = acoustic_lengths.to(acoustic.device)
        text_lengths = text_lengths.to(text.device)
        chosen = mask.any(1)
        if chosen.sum() < 2:
            return {}
        acoustic, acoustic_lengths = acoustic[chosen], acoustic_lengths[chosen]
        text, text_lengths, mask = text[chosen], text_lengths[chosen], mask[chosen]
        zhat, _ = self.alignment(acoustic, acoustic_lengths, text, text_lengths)
        other, _ = self.alignment(
            acoustic.roll(1, 0), acoustic_lengths.roll(1, 0), text, text_lengths
        )
        matched, mismatched = mean_cosine(zhat, text, mask), mean_cosine(other, text, mask)
        return {
            "cos_matched": matched,
            "cos_mismatched": mismatched,
            "transfer_gap": matched - mismatched,
        }
