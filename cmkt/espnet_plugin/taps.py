"""Where the acoustic sequence is taken from a separator.

A tap names a module inside the separator, which side of it to read, and the layout found there.
A new backbone joins with one entry of `TAPS`; the first of its taps is the one `auto` picks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cmkt.errors import CmktError


@dataclass(frozen=True)
class Tap:
    """One place to listen.

    Args:
        module: path inside the separator, as `named_modules` spells it.
        side: `input` or `output` of that module.
        layout: `BTD` (batch, frames, width) or `BDT`.
    """

    module: str
    side: str
    layout: str


TAPS: dict[str, dict[str, Tap]] = {
    "rnn": {"last": Tap("rnn", "output", "BTD")},
    "tcn": {
        "last": Tap("tcn.network.3", "input", "BDT"),
        "bottleneck": Tap("tcn.network.1", "output", "BDT"),
    },
}


def find_tap(separator_name: str, tap_name: str = "auto") -> Tap:
    """Look a tap up by the separator's and its own name.

    Raises:
        CmktError: a separator without taps, or a name that is not among them.
    """
    taps = TAPS.get(separator_name)
    if taps is None:
        raise CmktError(
            f"separator {separator_name} has no tap",
            remedy=f"use one of {', '.join(TAPS)}, or add it to cmkt/espnet_plugin/taps.py",
        )
    if tap_name == "auto":
        return next(iter(taps.values()))
    if tap_name not in taps:
        raise CmktError(
            f"transfer_conf.tap: {tap_name!r} is no tap of separator {separator_name}",
            remedy=f"use auto or one of {', '.join(taps)}",
        )
    return taps[tap_name]


@dataclass
class Heard:
    """What one forward pass left at the tap."""

    sequence: torch.Tensor | None = None  # (B, T_a, D_a)
    lengths: torch.Tensor | None = field(default=None)  # (B,) valid frames


@contextmanager
def listen(separator: torch.nn.Module, tap: Tap) -> Iterator[Heard]:
    """Listen at a tap while the block runs; the hooks are gone afterwards.

    Args:
        separator: an ESPnet separator, called inside the block as `separator(input, ilens, ...)`.
        tap: where to listen.

    Returns:
        a `Heard` that the forward pass fills.
    """
    heard = Heard()

    def keep(value):
        value = value[0] if isinstance(value, tuple) else value
        heard.sequence = value.transpose(1, 2) if tap.layout == "BDT" else value

    module = separator.get_submodule(tap.module)
    if tap.side == "input":
        at_tap = module.register_forward_pre_hook(lambda _, inputs: keep(inputs))
    else:
        at_tap = module.register_forward_hook(lambda _, inputs, output: keep(output))

    def keep_lengths(_, inputs):
        heard.lengths = inputs[1]

    at_entry = separator.register_forward_pre_hook(keep_lengths)
    try:
        yield heard
    finally:
        at_tap.remove()
        at_entry.remove()


@torch.no_grad()
def tap_width(encoder: torch.nn.Module, separator: torch.nn.Module, tap: Tap) -> int:
    """Find the width D_a at a tap by passing a short silence through.

    The silence goes through in evaluation mode, which draws no random number, so a model built
    with a tap starts from the same weights as one without.
    """
    training = separator.training
    separator.eval()
    speech = torch.zeros(1, 4000)
    features, lengths = encoder(speech, torch.tensor([speech.shape[1]]))
    with listen(separator, tap) as heard:
        separator(features, lengths, {})
    separator.train(training)
    return heard.sequence.shape[-1]
