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
    lengths = lengths.clamp(min=1)[:, None]
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
            `curriculum` (random, `maximum` shrinking to 0 over `curriculum_steps` updates).
        unit: `token` shifts the targets, `frame` the acoustic sequence.
        maximum: largest shift, in tokens or frames.
        edges: `pad` or `wrap` (see `shift`).
        curriculum_steps: training steps until the curriculum's shift is 0.

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
        for name, value in (("maximum", maximum), ("curriculum_steps", curriculum_steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"misalignment.{name} must be a whole number, not {value!r}")
        self.mode = "off" if mode is False else mode
        self.unit, self.maximum, self.edges = unit, maximum, edges
        self.curriculum_steps = curriculum_steps
        # In the checkpoint, so that a resumed curriculum goes on where it was.
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def draw(self, batch: int, device: torch.device) -> torch.Tensor:
        """Return the shifts (batch,) of this training step."""
        if self.mode == "fixed":
            return torch.full((batch,), self.maximum, device=device)
        maximum = self.maximum
        if self.mode == "curriculum":
            left = 1 - self.steps.item() / max(self.curriculum_steps, 1)
            maximum = round(self.maximum * max(left, 0.0))
            self.steps += 1
        return torch.randint(-maximum, maximum + 1, (batch,), device=device)

    def forward(self, acoustic, acoustic_lengths, text, text_lengths):
        """Return the acoustic sequence (B, T_a, D_a) and the targets (B, T_t, D_t), shifted."""
        if not self.training or self.mode == "off":
            return acoustic, text
        by = self.draw(len(text), text.device)
        if self.unit == "token":
            return acoustic, shift(text, text_lengths, by, self.edges)
        return shift(acoustic, acoustic_lengths, by, self.edges), text
