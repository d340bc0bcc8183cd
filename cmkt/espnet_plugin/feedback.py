"""The feedback adapter at a tap of a separator."""

import torch

from cmkt.errors import CmktError
from cmkt.espnet_plugin.layouts import axes_of, tensors_of
from cmkt.espnet_plugin.listening import find_layouts
from cmkt.espnet_plugin.taps import Tap
from cmkt.transfer.feedback import FeedbackAdapter
from cmkt.transfer.settings import build_part

# The largest share of the backbone's parameters that the adapter may have: it is no second model.
FEEDBACK_SHARE = 0.03
# What the alignment listens to where there is an adapter, and the stream that it is added to.
FEEDBACK_TAPS = (Tap("feedback.down", "output", "BTD"), Tap("feedback", "input", "BTD"))


def attach_feedback(
    encoder: torch.nn.Module, separator: torch.nn.Module, tap: Tap, conf: dict
) -> FeedbackAdapter:
    """Put a feedback adapter on a tap, as the separator's submodule `feedback`.

    Args:
        encoder: of the enhancement model.
        separator: changed in place.
        tap: where the adapter is added to the stream, over all channels and bands of a frame.
        conf: arguments of `FeedbackAdapter`.

    Raises:
        CmktError: the adapter is too large for this separator, or the stream at this tap is
            segmented, complex or of several tensors.
        ValueError: settings that the adapter does not take.
    """
    (tap,), (heard, _) = find_layouts(encoder, separator, [tap])
    axes, parts = axes_of(tap.layout), tensors_of(heard.values[tap])
    if "K" in axes or max(map(len, axes)) > 1 or len(parts) > 1 or parts[0].is_complex():
        raise CmktError(
            f"transfer_conf.feedback: cannot be added to the {tap} ({tap.layout})",
            remedy="use a tap of one real tensor whose axes are not merged or cut into segments",
        )
    order = sorted(range(len(axes)), key=lambda n: {"B": -2, "T": -1}.get(axes[n], n))
    size = sum(parameter.numel() for parameter in separator.parameters())
    width = heard.frames_at(tap).shape[2:].numel()
    adapter = build_part(FeedbackAdapter, "feedback", conf, width)
    share = sum(parameter.numel() for parameter in adapter.parameters()) / size
    if share > FEEDBACK_SHARE:
        raise CmktError(
            f"transfer_conf.feedback: the adapter has {100 * share:.1f} % of the separator's "
            f"parameters, at most {100 * FEEDBACK_SHARE:.0f} % are allowed",
            remedy="take a smaller width",
        )
    separator.feedback = adapter

    def add(value):
        """Add to the first tensor of a (nested) tuple."""
        if isinstance(value, tuple):
            return (add(value[0]), *value[1:])
        frames = value.permute(order)  # (B, T, ...)
        frames = adapter(frames.flatten(2)).view(frames.shape)
        return frames.permute([order.index(n) for n in range(len(order))])

    module = separator.get_submodule(tap.module)
    if tap.side == "input":
        module.register_forward_pre_hook(lambda _, inputs: add(inputs))
    else:
        module.register_forward_hook(lambda _, inputs, output: add(output))
    return adapter
