"""What zhat is trained with: losses against the token embeddings, and their weighted sum."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from cmkt.transfer.alignment.base import Aligned
from cmkt.transfer.distributed import mean_divisor
from cmkt.transfer.sequences import lengths_to_mask
from cmkt.transfer.settings import build_part, choice, number, unknown_key


def text_mask(text: torch.Tensor, text_lengths: torch.Tensor) -> torch.Tensor:
    """Return (B, T_t), true for real tokens; a zero vector stands for a missing transcript."""
    return lengths_to_mask(text_lengths.to(text.device), text.shape[1]) & text.ne(0).any(-1)


def cosines(zhat: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return cos(z_t, zhat_t) for each token (B, T_t), in float32."""
    return F.cosine_similarity(zhat.float(), text.float(), dim=-1, eps=1e-8)


def mean_cosine(zhat: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine over the real tokens, a scalar."""
    return cosines(zhat, text)[mask].mean()


class Batch(NamedTuple):
    """What a loss is computed from; all of it is 0 (`token_ids`: anything) outside the mask.

    Args:
        zhat: (B, T_t, D_t) in float32, made from the acoustic side.
        text: (B, T_t, D_t) in float32, the targets.
        mask: (B, T_t), true for the tokens that take part.
        token_ids: (B, T_t), which token each target is, or None.
        aligned: what the alignment has returned.
        reduction: `mean` or `sum` over an utterance's tokens.
    """

    zhat: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    token_ids: torch.Tensor | None
    aligned: Aligned
    reduction: str

    def over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Reduce values (B, T_t) to (B,)."""
        total = (values * self.mask).sum(1)
        return total / self.mask.sum(1).clamp(min=1) if self.reduction == "mean" else total


class Cosine:
    """1 - cos(z_t, zhat_t) over the tokens, L_CMA of Hung et al. 2025 (arXiv 2503.07078)."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return (B,)."""
        return batch.over_tokens(1 - cosines(batch.zhat, batch.text))


class SquaredError:
    """(z_t - zhat_t)^2, the mean over the dimensions, over the tokens."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return (B,)."""
        return batch.over_tokens((batch.zhat - batch.text).square().mean(-1))


class Contrastive:
    """InfoNCE: each zhat must be nearer to its own z than to the others of the batch.

    -log(exp(c_ii) / sum_j exp(c_ij)), c_ij = cos(zhat_i, z_j) / temperature. No j counts that says
    the same as i: equal token ids or, where these are not known and for utterances, equal
    embeddings (a cosine of 1).

    Args:
        temperature: above 0.
        level: `token` compares the tokens of the whole batch (van den Oord et al. 2018, arXiv
            1807.03748); `utterance` the mean vectors of the utterances, in both directions (as
            in Radford et al. 2021, arXiv 2103.00020); `both` is the sum of the two.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(self, temperature: float = 0.1, level: str = "token"):
        self.temperature = number("loss.contrastive.temperature", temperature, 0, above=True)
        self.level = choice("loss.contrastive.level", level, ("token", "utterance", "both"))

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return (B,)."""
        mask, loss = batch.mask, torch.zeros_like(batch.zhat[:, 0, 0])
        if self.level != "utterance":
            ids = None if batch.token_ids is None else batch.token_ids.flatten()
            zhat, text = batch.zhat.flatten(0, 1), batch.text.flatten(0, 1)  # (B T_t, D_t)
            there, _ = self._compare(zhat, text, mask.flatten(), ids)
            loss = loss + batch.over_tokens(there.view(mask.shape))
        if self.level != "token":
            tokens = mask.sum(1, keepdim=True).clamp(min=1)
            zhat, text = batch.zhat.sum(1) / tokens, batch.text.sum(1) / tokens  # (B, D_t)
            there, back = self._compare(zhat, text, mask.any(1))
            loss = loss + (there + back) / 2
        return loss

    def _compare(self, zhat, text, valid, token_ids=None):
        """Compare zhat (N, D) with text (N, D) where `valid` (N,).

        Returns:
            (N,) the loss of finding z among all z, and (N,) that of finding zhat among all zhat.
        """
        zhat, text = (F.normalize(x, dim=-1, eps=1e-8) for x in (zhat, text))
        if token_ids is None:
            same = text @ text.T > 1 - 1e-5  # (N, N), up to rounding
        else:
            same = token_ids[:, None] == token_ids
        left_out = (same | ~valid | ~valid[:, None]).fill_diagonal_(False)
        logits = (zhat @ text.T / self.temperature).masked_fill(left_out, float("-inf"))
        own = logits.diagonal()
        return logits.logsumexp(1) - own, logits.logsumexp(0) - own


class TransportCost:
    """The cost of the alignment's transport plan."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return (B,)."""
        if batch.aligned.cost is None:
            raise ValueError(NO_COST)
        return batch.aligned.cost.float()


class Own:
    """What the alignment itself is trained with (of CTC, of integrate-and-fire)."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return (B,)."""
        return batch.aligned.loss.float()


LOSSES = {
    "cosine": Cosine,
    "mse": SquaredError,
    "contrastive": Contrastive,
    "transport_cost": TransportCost,
    "own": Own,
}
NO_COST = "transport_cost needs an optimal-transport alignment"


class TransferLoss(nn.Module):
    """L_CMA: the weighted sum of losses, each the mean over the utterances that have text.

    In distributed training that is the mean over the utterances of all processes.

    Args:
        conf: a key of `LOSSES`, or a mapping from keys to their weights or, for a loss with
            settings, to a mapping with `weight` (default 1) and these; for example
            {cosine: 1.0, contrastive: {weight: 0.5, temperature: 0.1}}. `own`, the alignment's own
            loss where it has one, is always added, unless its weight is set to 0.
        reduction: `mean` or `sum` (the paper's) over an utterance's tokens.

    Raises:
        ValueError: an unknown loss or key, a value of the wrong type or outside its range.
    """

    def __init__(self, conf: str | dict = "cosine", reduction: str = "mean"):
        super().__init__()
        self.reduction = choice("reduction", reduction, ("mean", "sum"))
        if not isinstance(conf, dict):
            conf = {choice("loss", conf, LOSSES): 1.0}
        if not conf:
            raise ValueError(f"loss names none of {', '.join(LOSSES)}")
        self.weights, self.losses = {}, {}
        for name, settings in {"own": 1.0, **conf}.items():
            if name not in LOSSES:
                raise ValueError(f"loss: {unknown_key(name, LOSSES)}")
            settings = dict(settings) if isinstance(settings, dict) else {"weight": settings}
            self.weights[name] = number(f"loss.{name}.weight", settings.pop("weight", 1.0), 0)
            self.losses[name] = build_part(LOSSES[name], f"loss.{name}", settings)

    def check(self, alignment: nn.Module) -> None:
        """Refuse a loss that the alignment cannot serve.

        Raises:
            ValueError: `transport_cost` with an alignment that has no transport plan (`has_cost`).
        """
        if "transport_cost" in self.losses and not getattr(alignment, "has_cost", False):
            raise ValueError(NO_COST)

    def forward(
        self,
        aligned: Aligned,
        text: torch.Tensor,
        mask: torch.Tensor,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute L_CMA.

        Args:
            aligned: what the alignment has returned.
            text: (B, T_t, D_t), targets.
            mask: (B, T_t), true for the tokens that take part; outside it, anything may stand.
            token_ids: (B, T_t), which token each target is, where known; for `contrastive`.

        Returns:
            a scalar, 0 and still attached to the graph when no token takes part, so that every
            parameter takes part in distributed training; and each loss by name, without weight.
        """
        chosen = mask.any(1)
        # In evaluation a process may be alone at it, so nothing is summed over processes there.
        utterances = mean_divisor(chosen) if self.training else chosen.sum().clamp(min=1)
        # Half precision would lose the small differences that a cosine is made of.
        with torch.autocast(text.device.type, enabled=False):
            # Masked first: a NaN in the padding would reach the gradient through a weight of 0.
            zhat, text = (
                x.float().masked_fill(~mask[..., None], 0.0) for x in (aligned.zhat, text)
            )
            batch = Batch(zhat, text, mask, token_ids, aligned, self.reduction)
            total, parts = 0.0 * zhat.sum(), {}
            for name, loss in self.losses.items():
                if name == "own" and aligned.loss is None:
                    continue
                part = loss(batch).masked_fill(~chosen, 0.0).sum() / utterances
                total = total + self.weights[name] * part
                parts[name] = part.detach()
        if not parts:
            raise ValueError("loss.own alone needs an alignment that has a loss of its own")
        return total, parts
