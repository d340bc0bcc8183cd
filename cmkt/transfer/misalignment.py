"""Controlled temporal shifts between the acoustic and the linguistic side, in training only.

The paper (Hung et al. 2025, arXiv 2503.07078) names a misalignment strategy; its unit, its size and
its schedule could not be read, so these are ours.
"""

from typing import NamedTuple

import torch
from torch import nn

from cmkt.transfer.sequences import lengths_to_mask, relative_positions
from cmkt.transfer.settings import choice, number, whole

MODES = ("off", "fixed", "random", "curriculum", "shuffle")
SIDES = {"token": ("targets", "queries"), "frame": ("acoustic",)}
ALL_SIDES = (*SIDES["token"], *SIDES["frame"])


class Moved(NamedTuple):
    """What the alignment is given and what its result is compared with.

    Args:
        acoustic: (B, T_a, D_a).
        queries: (B, T_t, D_t), the text given to the alignment.
        targets: (B, T_t, D_t), the text that zhat is compared with.
        query_ids: (B, T_t), token ids of the queries, if known.
        target_ids: (B, T_t), token ids of the targets, if known.
        positions: (B, T_t), which token of the utterance each query is; None if token t itself.
        valid: (B, T_t), false where a token must take no part in the loss.
    """

    acoustic: torch.Tensor
    queries: torch.Tensor
    targets: torch.Tensor
    query_ids: torch.Tensor | None
    target_ids: torch.Tensor | None
    positions: torch.Tensor | None
    valid: torch.Tensor


def sources(
    lengths: torch.Tensor, size: int, by: torch.Tensor, edges: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return from where each position of a shifted sequence comes: t from t + by.

    Args:
        lengths: (B,) valid positions; what lies behind them stays where it is.
        size: T, of the padded sequence.
        by: (B,) whole positions, of either sign.
        edges: `pad` or `clip` repeat the first or last valid position, `wrap` goes around.

    Returns:
        (B, T) source positions; (B, T), false where `clip` takes a position from outside.
    """
    steps = torch.arange(size, device=lengths.device)[None]
    ends = lengths.clamp(min=1)[:, None]
    wanted = steps + by[:, None]
    if edges == "wrap":
        source = wanted.remainder(ends)
    else:
        source = torch.minimum(wanted.clamp(min=0), ends - 1)
    source = torch.where(steps < ends, source, steps)
    inside = source == wanted if edges == "clip" else torch.ones_like(source, dtype=torch.bool)
    return source, inside | (steps >= ends)


def shuffled(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Return (B, size) a random order of the valid positions; what lies behind stays."""
    keys = torch.rand(len(lengths), size, device=lengths.device)
    behind = 1.0 + torch.arange(size, device=lengths.device)
    return torch.where(lengths_to_mask(lengths, size), keys, behind).argsort(1)


def take(sequence: torch.Tensor | None, source: torch.Tensor) -> torch.Tensor | None:
    """Return a sequence (B, T) or (B, T, D) with what stood at `source` (B, T)."""
    if sequence is None:
        return None
    if sequence.dim() == 3:
        source = source[..., None].expand_as(sequence)
    return sequence.gather(1, source)


class Misalignment(nn.Module):
    """Draw a shift k of the utterance and apply it: position t gets what stood at t + k.

    Args:
        mode: `off`; `fixed`: k is the maximum; `random`: a whole number, each in [-maximum,
            maximum] as likely; `curriculum`: random, with a maximum that changes during training;
            `shuffle`: no shift but the tokens of each utterance in random order, the control in
            which the time order says nothing. (The control across utterances is other transcripts:
            `cmkt embed --text_source shuffled`.)
        unit: `token` or `frame`.
        side: what moves. `targets` (default for tokens): zhat_t is compared with z_{t+k}.
            `queries`: in the place of token t the alignment is given the text of token t + k, and
            the answer is compared with z_t; of an alignment that does not use the embeddings, the
            answer for token t + k is. `acoustic` (for frames, and only there).
        maximum: largest shift, in units; 1 if `maximum_share` is not set either.
        maximum_share: largest shift as a share of the utterance's length (tokens or frames), in
            [0, 1], rounded down. With both, the smaller one holds.
        edges: what comes from outside the utterance. `pad`: its first or last token or frame;
            `wrap`: goes around; `clip`: as `pad`, but such a token, or a token whose own place
            holds such a frame, takes no part in the loss.
        per: `utterance` or `batch`: what has a k of its own (with `maximum_share` a k in
            proportion to the length).
        direction: of the curriculum: `shrinking` from the maximum to 0 or `growing` from 0.
        until: share of the training, above 0 and at most 1, by which the curriculum has ended.

    Raises:
        ValueError: a value of the wrong type or outside its range, or a side that does not go with
            the unit.
    """

    def __init__(
        self,
        mode: str = "off",
        unit: str = "token",
        side: str | None = None,
        maximum: int | None = None,
        maximum_share: float | None = None,
        edges: str = "pad",
        per: str = "utterance",
        direction: str = "shrinking",
        until: float = 1.0,
    ):
        super().__init__()
        # YAML reads a bare `off` as false.
        self.mode = choice("misalignment.mode", "off" if mode is False else mode, MODES)
        self.unit = choice("misalignment.unit", unit, SIDES)
        self.side = choice("misalignment.side", SIDES[unit][0] if side is None else side, ALL_SIDES)
        if self.side not in SIDES[unit]:
            raise ValueError(f"misalignment.side {side} does not go with misalignment.unit {unit}")
        if mode == "shuffle" and unit == "frame":
            raise ValueError("misalignment.mode shuffle needs misalignment.unit token")
        if maximum_share is not None:
            number("misalignment.maximum_share", maximum_share, 0, 1)
        elif maximum is None:
            maximum = 1
        if maximum is not None:
            whole("misalignment.maximum", maximum, 0)
        self.maximum, self.maximum_share = maximum, maximum_share
        self.edges = choice("misalignment.edges", edges, ("pad", "wrap", "clip"))
        self.per = choice("misalignment.per", per, ("utterance", "batch"))
        self.direction = choice("misalignment.direction", direction, ("shrinking", "growing"))
        self.until = number("misalignment.until", until, 0, 1, above=True)

    def draw(self, lengths: torch.Tensor, progress: float = 0.0) -> torch.Tensor:
        """Return the shifts (B,) of utterances of these lengths (B,)."""
        bounds = []
        if self.maximum is not None:
            bounds.append(torch.full_like(lengths, self.maximum))
        if self.maximum_share is not None:
            # The small number, since 0.29 * 100 is below 29 in binary.
            bounds.append((lengths.double() * self.maximum_share + 1e-9).to(lengths))
        maximum = torch.stack(bounds).amin(0)
        if self.mode == "fixed":
            return maximum
        if self.mode == "curriculum":
            over = min(progress / self.until, 1.0)
            left = 1 - over if self.direction == "shrinking" else over
            maximum = (maximum * left).round()
        chance = torch.rand(1 if self.per == "batch" else len(lengths), device=lengths.device)
        by = (chance * (2 * maximum + 1)).floor() - maximum
        # Rounding may reach 2 maximum + 1.
        return torch.minimum(by, maximum).long()

    def forward(
        self,
        acoustic: torch.Tensor,
        acoustic_lengths: torch.Tensor,
        text: torch.Tensor,
        text_lengths: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        progress: float = 0.0,
    ) -> Moved:
        """Move one side.

        Args:
            acoustic: (B, T_a, D_a).
            acoustic_lengths: (B,) valid frames.
            text: (B, T_t, D_t).
            text_lengths: (B,) valid tokens.
            token_ids: (B, T_t), which token each is, if known.
            progress: share of the training that is over, for the curriculum.
        """
        everywhere = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        moved = Moved(acoustic, text, text, token_ids, token_ids, None, everywhere)
        if not self.training or self.mode == "off":
            return moved
        tokens, frames = text_lengths.to(text.device), acoustic_lengths.to(acoustic.device)
        if self.side == "acoustic":
            by = self.draw(frames, progress)
            source, inside = sources(frames, acoustic.shape[1], by, self.edges)
            # (B, T_t), the frame at the middle of each token's place in the time order
            middle = (relative_positions(tokens, text.shape[1]) * frames[:, None]).long()
            valid = inside.gather(1, middle.clamp(max=acoustic.shape[1] - 1))
            return moved._replace(acoustic=take(acoustic, source), valid=valid)
        if self.mode == "shuffle":
            source, inside = shuffled(tokens, text.shape[1]), everywhere
        else:
            source, inside = sources(tokens, text.shape[1], self.draw(tokens, progress), self.edges)
        text, ids = take(text, source), take(token_ids, source)
        if self.side == "queries":
            return moved._replace(queries=text, query_ids=ids, positions=source, valid=inside)
        return moved._replace(targets=text, target_ids=ids, valid=inside)
