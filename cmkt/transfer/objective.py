"""Alignment, misalignment and loss in one module, for any training loop."""

import torch
from torch import nn

from cmkt.transfer.alignment import build_alignment
from cmkt.transfer.alignment.base import Aligned
from cmkt.transfer.alpha import build_alpha
from cmkt.transfer.diagnostics import (
    DIAGNOSTICS,
    entropy,
    gradient_norm,
    monotonicity,
    retrieval,
)
from cmkt.transfer.distributed import is_distributed
from cmkt.transfer.losses import TransferLoss, mean_cosine, text_mask
from cmkt.transfer.misalignment import Misalignment, take
from cmkt.transfer.settings import build_part
from cmkt.transfer.targets import Targets


class CrossModalTransfer(nn.Module):
    """L = alpha L_SE + (1 - alpha) L_CMA (Hung et al. 2025, arXiv 2503.07078).

    Args:
        acoustic_dim: D_a, width of the tapped acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        alpha: weight of the enhancement loss, in [0, 1], or a schedule (see `build_alpha`).
        alignment: `type` and its settings (see `build_alignment`).
        loss: of zhat against the embeddings, a name or several with weights (see `TransferLoss`).
        misalignment: arguments of `Misalignment`.
        reduction: `mean` or `sum` over the tokens of an utterance.
        standardise: compare with embeddings of mean 0 and variance 1 in each dimension.
        pca: compare with this many principal components.
        vocabulary: how many different tokens there are, for an alignment that must know.

    `standardise` and `pca` need the statistics of the training set: `targets.set_statistics`.

    Raises:
        ValueError: an unknown key, a wrong type, a value outside its range.

    Attributes:
        progress: share of the training that is over, in [0, 1]. The training loop sets it; all
            schedules read it.
        logged: parts of the last loss, and the weight of L_CMA, by name.

    Convention: an utterance without a transcript has text of zeros (one row) and no loss.

    Example:
        transfer = CrossModalTransfer(acoustic_dim=256, linguistic_dim=384)
        transfer.progress = step / steps  # only schedules need it
        loss_cma = transfer(hidden, frames, token_embeddings, tokens)
        transfer.combine(loss_se, loss_cma).backward()
    """

    def __init__(
        self,
        acoustic_dim: int,
        linguistic_dim: int,
        alpha: float | dict = 0.9,
        alignment: dict | None = None,
        loss: str | dict = "cosine",
        misalignment: dict | None = None,
        reduction: str = "mean",
        standardise: bool = False,
        pca: int | None = None,
        vocabulary: int | None = None,
    ):
        super().__init__()
        self.progress = 0.0
        self.logged: dict[str, torch.Tensor] = {}
        self.alpha = build_alpha(alpha)
        self.targets = Targets(linguistic_dim, standardise, pca)
        self.alignment = build_alignment(
            alignment, acoustic_dim, self.targets.dimension, vocabulary
        )
        self.loss = TransferLoss(loss, reduction)
        self.loss.check(self.alignment)
        self.misalignment = build_part(Misalignment, "misalignment", misalignment)
        self.set_candidates(torch.zeros(0, linguistic_dim), None)

    def set_candidates(self, text: torch.Tensor, token_ids: torch.Tensor | None) -> None:
        """Set among which tokens `diagnostics` looks for each; without, those of the batch.

        Args:
            text: (N, D_t) token embeddings, for example of 100 utterances.
            token_ids: (N,) which token each is.
        """
        self.register_buffer("candidates", text, persistent=False)
        self.register_buffer("candidate_ids", token_ids, persistent=False)

    def forward(
        self,
        acoustic: torch.Tensor,
        acoustic_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute L_CMA.

        Args:
            acoustic: (B, T_a, D_a), gradients flow into it.
            acoustic_lengths: (B,) valid frames.
            text: (B, T_t, D_t) token embeddings; no gradient reaches them.
            text_lengths: (B,) valid tokens.
            token_ids: (B, T_t), which token each is; only some alignments need it.

        Returns:
            a scalar over the utterances that have text; 0, still attached to the graph, when none
            has, so that every parameter takes part in distributed training.
        """
        text = text.detach()
        if text.shape[1] == 0:
            # Attention from no token would leave parameters without a gradient.
            text = text.new_zeros(len(text), 1, text.shape[2])
            token_ids = None if token_ids is None else token_ids.new_zeros(len(text), 1)
        mask = text_mask(text, text_lengths)
        text = self.targets(text)
        moved = self.misalignment(
            acoustic, acoustic_lengths, text, text_lengths, token_ids, self.progress
        )
        asked = moved.positions is not None and not self.alignment.uses_text
        queries, query_ids = (text, token_ids) if asked else (moved.queries, moved.query_ids)
        aligned = self.alignment(moved.acoustic, acoustic_lengths, queries, text_lengths, query_ids)
        if asked:  # what it makes of token t does not depend on the text given for token t
            aligned = aligned._replace(zhat=take(aligned.zhat, moved.positions))
        loss, parts = self.loss(aligned, moved.targets, mask & moved.valid, moved.target_ids)
        self.logged = {f"loss_{name}": part.detach() for name, part in parts.items()}
        return loss

    def combine(
        self,
        loss_se: torch.Tensor,
        loss_cma: torch.Tensor,
        stream: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return alpha L_SE + (1 - alpha) L_CMA.

        Args:
            loss_se: enhancement loss.
            loss_cma: what `forward` has returned.
            stream: the tapped tensors, for `alpha: {schedule: balanced}`, which compares the
                gradients there.
        """
        loss = self.alpha(loss_se, loss_cma, stream, self.progress)
        self.logged["weight_cma"] = torch.as_tensor(self.alpha.weights(self.progress)[1])
        return loss

    def gradient_share(
        self, loss_se: torch.Tensor, loss_cma: torch.Tensor, stream: list[torch.Tensor]
    ) -> torch.Tensor:
        """Return the transfer's share of the (weighted) gradient norms at the tap, in [0, 1]."""
        of_se, of_cma = self.alpha.weights(self.progress)
        of_se = of_se * gradient_norm(loss_se, stream)
        of_cma = of_cma * gradient_norm(loss_cma, stream)
        return of_cma / (of_se + of_cma).clamp(min=1e-30)

    def align(
        self,
        acoustic: torch.Tensor,
        acoustic_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> Aligned:
        """Align without any shift, and return the weights as well; arguments as `forward`."""
        return self.alignment(
            acoustic, acoustic_lengths, self.targets(text), text_lengths, token_ids, True
        )

    @torch.no_grad()
    def diagnostics(
        self,
        acoustic: torch.Tensor,
        acoustic_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Tell transfer from leakage: compare with the acoustics of another utterance.

        Returns:
            `cos_matched`, `cos_mismatched` (acoustics rolled among the utterances with text) and
            their difference `transfer_gap`; `retrieval_top1` and `retrieval_top5` (see
            `retrieval`), the same with `_mismatched`; `alignment_entropy` and
            `alignment_monotonicity`. Empty when fewer than two utterances have text; NaN instead
            on a process of a distributed training.
        """
        mask = text_mask(text, text_lengths)
        chosen = mask.any(1)
        if chosen.sum() < 2:
            # All processes of a distributed training must report the same names.
            missing = text.new_tensor(float("nan"), dtype=torch.float32)
            return dict.fromkeys(DIAGNOSTICS, missing) if is_distributed() else {}
        acoustic, acoustic_lengths = acoustic[chosen], acoustic_lengths.to(acoustic.device)[chosen]
        text, text_lengths = text[chosen], text_lengths.to(text.device)[chosen]
        mask = mask[chosen]
        token_ids = None if token_ids is None else token_ids[chosen]
        matched = self.align(acoustic, acoustic_lengths, text, text_lengths, token_ids)
        rolled = acoustic.roll(1, 0), acoustic_lengths.roll(1, 0)
        other = self.align(*rolled, text, text_lengths, token_ids)
        target = self.targets(text)
        real, ids = target[mask], None if token_ids is None else token_ids[mask]
        candidates, candidate_ids = real, ids
        if len(self.candidates):
            candidates, candidate_ids = self.targets(self.candidates), self.candidate_ids
        values = {}
        for name, aligned in (("matched", matched), ("mismatched", other)):
            values[f"cos_{name}"] = mean_cosine(aligned.zhat, target, mask)
            found = retrieval(aligned.zhat[mask], real, ids, candidates, candidate_ids)
            suffix = "" if name == "matched" else "_mismatched"
            values |= {f"retrieval_{key}{suffix}": value for key, value in found.items()}
        values["transfer_gap"] = values["cos_matched"] - values["cos_mismatched"]
        values["alignment_entropy"] = entropy(matched.weights, mask, acoustic_lengths)
        values["alignment_monotonicity"] = monotonicity(matched.weights, mask)
        return values
