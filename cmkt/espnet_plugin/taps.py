"""Where the acoustic sequence is taken from a separator, and where something is added to it.

A tap names a module inside the separator, which side of it to read, and the layout found there.
A new backbone joins with one entry of `TAPS`; the first of its taps is the one `auto` picks.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from cmkt.errors import CmktError
from cmkt.espnet_plugin.recurrent import run_layer_by_layer
from cmkt.transfer.feedback import FeedbackAdapter
from cmkt.transfer.settings import build_part


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
    "rnn": {
        "last": Tap("rnn", "output", "BTD"),
        "first": Tap("rnn.nbrnn.after.0", "output", "BTD"),
    },
    "tcn": {
        "last": Tap("tcn.network.3", "input", "BDT"),
        "first": Tap("tcn.network.2.1.0", "input", "BDT"),
        "bottleneck": Tap("tcn.network.1", "output", "BDT"),
    },
}

# The largest share of the backbone's parameters that the adapter may have: it is no second model.
FEEDBACK_SHARE = 0.03
# What the alignment listens to where there is an adapter, and the stream that it is added to.
FEEDBACK_TAPS = (Tap("feedback.down", "output", "BTD"), Tap("feedback", "input", "BTD"))


def find_taps(separator_name: str, names: str | Sequence[str] = "auto") -> list[Tap]:
    """Look taps up by the separator's name and their own.

    Args:
        separator_name: as in the YAML, for example `rnn`.
        names: one name, or several in a list.

    Raises:
        CmktError: a separator without taps, or a name that is not among them.
    """
    taps = TAPS.get(separator_name)
    if taps is None:
        raise CmktError(
            f"separator {separator_name} has no tap",
            remedy=f"use one of {', '.join(TAPS)}, or add it to cmkt/espnet_plugin/taps.py",
        )
    found = []
    for name in [names] if isinstance(names, str) else names or ["auto"]:
        if name != "auto" and name not in taps:
            raise CmktError(
                f"transfer_conf.tap: {name!r} is no tap of separator {separator_name}",
                remedy=f"use auto or one of {', '.join(taps)}, or several in a list",
            )
        found.append(next(iter(taps.values())) if name == "auto" else taps[name])
    return list(dict.fromkeys(found))


def prepare_separator(separator: torch.nn.Module, taps: Sequence[Tap]) -> None:
    """Make the places between the layers of a recurrent network reachable, if a tap is there."""
    if any(".after." in tap.module for tap in taps):
        run_layer_by_layer(separator)
    for tap in taps:
        try:
            separator.get_submodule(tap.module)
        except AttributeError as error:
            raise CmktError(
                f"transfer_conf.tap: this separator has no module {tap.module}"
            ) from error


@dataclass
class Heard:
    """What one forward pass left at the taps."""

    parts: dict[Tap, torch.Tensor] = field(default_factory=dict)  # each (B, T_a, D_a of the tap)
    lengths: torch.Tensor | None = None  # (B,) valid frames

    def sequence(self, taps: Sequence[Tap]) -> torch.Tensor:
        """Return what was heard at some taps, side by side: (B, T_a, sum of the D_a)."""
        parts = [self.parts[tap] for tap in taps]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _frames_first(tap: Tap, value):
    """Return what stands at a tap as (B, T_a, D_a)."""
    value = value[0] if isinstance(value, tuple) else value
    return value.transpose(1, 2) if tap.layout == "BDT" else value


@contextmanager
def listen(separator: torch.nn.Module, taps: Iterable[Tap]) -> Iterator[Heard]:
    """Listen at some taps while the block runs; the hooks are gone afterwards.

    Args:
        separator: an ESPnet separator, called inside the block as `separator(input, ilens, ...)`.
        taps: where to listen.

    Returns:
        a `Heard` that the forward pass fills.
    """
    heard = Heard()

    def keep_lengths(_, inputs):
        heard.lengths = inputs[1]

    def keep(tap, value):
        heard.parts[tap] = _frames_first(tap, value)

    with ExitStack() as hooks:
        handles = [separator.register_forward_pre_hook(keep_lengths)]
        for tap in taps:
            module = separator.get_submodule(tap.module)
            if tap.side == "input":
                hook = module.register_forward_pre_hook(lambda _, x, tap=tap: keep(tap, x))
            else:
                hook = module.register_forward_hook(lambda _, x, y, tap=tap: keep(tap, y))
            handles.append(hook)
        for handle in handles:
            hooks.callback(handle.remove)
        yield heard


@torch.no_grad()
def tap_width(encoder: torch.nn.Module, separator: torch.nn.Module, taps: Sequence[Tap]) -> int:
    """Find the width D_a of what is heard at some taps by passing a short silence through.

    The silence goes through in evaluation mode, which draws no random number, so a model built
    with a tap starts from the same weights as one without.

    Raises:
        CmktError: taps with different numbers of frames.
    """
    training = separator.training
    separator.eval()
    speech = torch.zeros(1, 4000)
    features, lengths = encoder(speech, torch.tensor([speech.shape[1]]))
    with listen(separator, taps) as heard:
        separator(features, lengths, {})
    separator.train(training)
    if len({part.shape[1] for part in heard.parts.values()}) > 1:
        raise CmktError("transfer_conf.tap: the taps differ in their numbers of frames")
    return heard.sequence(taps).shape[-1]


def attach_feedback(
    encoder: torch.nn.Module, separator: torch.nn.Module, tap: Tap, conf: dict
) -> FeedbackAdapter:
    """Put a feedback adapter on a tap, as the separator's submodule `feedback`.

    Args:
        encoder: of the enhancement model.
        separator: changed in place.
        tap: where the adapter is added to the stream.
        conf: arguments of `FeedbackAdapter`.

    Raises:
        CmktError: the adapter is too large for this separator.
        ValueError: settings that the adapter does not take.
    """
    size = sum(parameter.numel() for parameter in separator.parameters())
    adapter = build_part(FeedbackAdapter, "feedback", conf, tap_width(encoder, separator, [tap]))
    share = sum(parameter.numel() for parameter in adapter.parameters()) / size
    if share > FEEDBACK_SHARE:
        raise CmktError(
            f"transfer_conf.feedback: the adapter has {100 * share:.1f} % of the separator's "
            f"parameters, at most {100 * FEEDBACK_SHARE:.0f} % are allowed",
            remedy="take a smaller width",
        )
    separator.feedback = adapter

    def add(value):
        first, *rest = value if isinstance(value, tuple) else (value,)
        first = adapter(_frames_first(tap, first))
        first = first.transpose(1, 2) if tap.layout == "BDT" else first
        return (first, *rest) if isinstance(value, tuple) else first

    module = separator.get_submodule(tap.module)
    if tap.side == "input":
        module.register_forward_pre_hook(lambda _, inputs: add(inputs))
    else:
        module.register_forward_hook(lambda _, inputs, output: add(output))
    return adapter
