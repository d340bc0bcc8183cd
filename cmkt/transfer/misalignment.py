"""Controlled temporal shifts between the acoustic and the linguistic side, in training only.

The paper names a misalignment strategy; its unit and size could not be read, so these are ours.
"""

import torch
from torch import nn

MODES = ("off", "fixed", "random", "curriculum")


def shift(
    sequence: torch.Tensor, lengths: torch.Tensor, by: torch.Tensor, edges: str
) -> torch.Tensor:
    """Shift each sequence: position t gets what stood at t + by.

    Args:
        sequence: (B, T, D).
        lengths: (B,) valid positions; what lies behind them stays where it is.
        by: (B,) whole positions, of either sign.
        edges: `pad` repeats the first or last valid position, `wrap` goes around.

    Returns:
        (B, T, D).
    """
    steps = torch.arange(sequence.shape[1], device=sequence.device)[None]
    lengths = lengths.to(sequence.device).clamp(min=1)[:, None]
    source = steps + by[:, None]
    if edges == "wrap":
        source = source.remainder(lengths)
    else:
        source = torch.minimum(source.clamp(min=0), lengths - 1)
    source = torch.where(steps < lengths, source, steps)
    return sequence.gather(1, source[..., None].expand_as(sequence))


class Misalignment(nn.Module):
    """Draw a shift for each utterance and apply it.

    Args:
        mode: `off`; `fixed` (always `maximum`); `random` (uniform in [-maximum, maximum]);
            `curriculum` (random, `maximum` shrinking to 0 over `curriculum_steps`).
        unit: `token` shifts the targets, `frame` the acoustic sequence.
        maximum: largest shift, in tokens or frames.
        edges: `pad` or `wrap` (see `shift`).
        curriculum_steps: training forwards until the curriculum's shift is 0.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(
        self,
        mode: str = "off",
        unit: str = "token",
        maximum: int = 1,
        edges: str = "pad",
        curriculum_steps: int = 1000,
    ):
        super().__init__()
        for name, value, known in (
            ("mode", mode, MODES),
            ("unit", unit, ("token", "frame")),
            ("edges", edges, ("pad", "wrap")),
        ):
            # YAML reads a bare `off` as false.
            value = "off" if name == "mode" and value is False else value
            if value not in known:
                raise ValueError(
                    f"misalignment.{name} must be one of {', '.join(known)}, not {value!r}"
                )
        for name, value, least in (
            ("maximum", maximum, 0),
            ("curriculum_steps", curriculum_steps, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"misalignment.{name} must be a whole number of at least {least}, not {value!r}"
                )
        self.mode = "off" if mode is False else mode
        self.unit, self.maximum, self.edges = unit, maximum, edges
        self.curriculum_steps = curriculum_steps
        # In the checkpoint, so that a resumed curriculum goes on where it was.
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def draw(self, batch: int, device: torch.device) -> torch.Tensor:
        """Return the shifts (batch,) of this training step."""
        if self.mode == "fixed":
            return torch.full((batch,), self.maximum, device=device)
        if self.mode == "random":
            return torch.randint(-self.maximum, self.maximum + 1, (batch,), device=device)
        # In tensors, so that a GPU need not wait for the step count.
        left = (1 - self.steps / self.curriculum_steps).clamp(min=0)
        maximum = (self.maximum * left).round()
        self.steps += 1
        by = (torch.rand(batch, device=device) * (2 * maximum + 1)).floor() - maximum
        return torch.minimum(by, maximum).long()

    def forward(self, acoustic, acoustic_lengths, text, text_lengths):
        """Return the acoustic sequence (B, T_a, D_a) and the targets (B, T_t, D_t), shifted.

        Args:
            acoustic: (B, T_a, D_a).
            acoustic_lengths: (B,) valid frames.
            text: (B, T_t, D_t).
            text_lengths: (B,) valid tokens.
        """
        if not self.training or self.mode == "off":
            return acoustic, text
        by = self.draw(len(text), text.device)
        if self.unit == "token":
            return acoustic, shift(text, text_lengths, by, self.edges)
        return shift(acoustic, acoustic_lengths, by, self.edges), text
