"""Tell how large a model is and what it costs to run.

Printed are the parameters of the enhancement model; those of the transfer, which only training
has; the multiply-accumulates (MACs) of a second of audio, as the mean over 4 s; how far an output
sample looks back and ahead, and the algorithmic latency that follows; the tap; and the parameters
and MACs of a feedback adapter, with their shares of the separator's parameters and of
the other MACs. MACs are those of matrix products and convolutions; Fourier transforms and
element-wise operations are left out.

    cmkt info conf/train_tcn_cmkt.yaml --linguistic_dim 384
    cmkt info conf/train_mp_senet.yaml --size tiny
    cmkt info exp/tcn_cmkt_minilm_seed0
    cmkt info exp/tcn_cmkt_minilm_seed0/export --json
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from cmkt.errors import CmktError
from cmkt.espnet_plugin.receptive_field import SECONDS as REACH
from cmkt.espnet_plugin.receptive_field import (
    ReceptiveField,
    find_receptive_field,
    make_recurrences_remember,
)
from cmkt.espnet_plugin.sizes import apply_size
from cmkt.settings import read_mapping

SECONDS = 4  # MACs are not linear in the length: an STFT has a frame at each end, attention squares


def add_arguments(parser) -> None:
    """Add the options of `cmkt info`."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="training YAML, training folder or export"
    )
    parser.add_argument(
        "--linguistic_dim",
        type=int,
        metavar="D",
        help="width of the token embeddings, for the transfer of a YAML that does not have it",
    )
    parser.add_argument("--size", help="another size of a training YAML, for example tiny")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> None:
    """Run `cmkt info`."""
    if args.linguistic_dim is not None and args.linguistic_dim < 1:
        raise CmktError("--linguistic_dim must be at least 1")
    config = read_config(args.model)
    if args.size is not None:
        if args.model.is_dir():
            raise CmktError("--size is for training YAMLs", args.model)
        config = apply_size(config, args.model, args.size)
    values = describe(config, args.linguistic_dim)
    if args.json:
        print(json.dumps({"model": str(args.model), **values}, indent=2))
    else:
        print(as_text(values))


def read_config(model: Path) -> dict:
    """Read what a model was trained with.

    Args:
        model: a training YAML, a training folder, or an export.

    Returns:
        the configuration of its training. Of an export it has what builds the model and the
        transfer.

    Raises:
        CmktError: none of the three.
    """
    from cmkt.enhance.export import FEEDBACK_PREFIX

    file = model / "config.yaml" if model.is_dir() else model
    config = read_mapping(file, "model", "give a training YAML, a training folder or an export")
    for key in ("encoder", "separator", "decoder"):
        if not isinstance(config.get(key), str):
            raise CmktError(f"not a training configuration: no {key}", file)
    if model.is_dir() and (model / "meta.yaml").exists():
        meta = read_mapping(model / "meta.yaml")
        config |= {key: meta.get(key) for key in ("transfer", "transfer_conf")}
        config["separator"] = config["separator"].removeprefix(FEEDBACK_PREFIX)
        config.pop("feedback", None)
    if config.get("transfer") == "cmkt" and not isinstance(config.get("transfer_conf"), dict):
        raise CmktError("transfer_conf must be a mapping", file)
    return config


def describe(config: dict, linguistic_dim: int | None = None) -> dict:
    """Measure a model.

    Args:
        config: of a training.
        linguistic_dim: width of the token embeddings, where `transfer_conf` does not have it.

    Returns:
        `sample_rate` in Hz, `parameters`, `transfer_parameters` (None: not known without
        `linguistic_dim`), `macs_per_second`, `receptive_field` (`past` and `future` in seconds;
        None: `receptive_field.SECONDS` or more), `latency` in ms (None: not causal), `normalises`
        (whether the level of the whole signal is needed first), `taps` (module, side, layout, width
        and frames per second of each) and `feedback` (`parameters`, `macs_per_second`,
        `share_of_parameters` and `share_of_macs` in per cent; None without adapter).

    Raises:
        CmktError: the model cannot be built.
    """
    from cmkt.enhance.export import find_sample_rate
    from cmkt.espnet_plugin.build import build_enhancement_model

    model, transfer_parameters, taps = build_enhancement_model(config), 0, []
    sample_rate = find_sample_rate(config)
    if config.get("transfer") == "cmkt":
        conf, name = dict(config["transfer_conf"]), config["separator"]
        model, transfer_parameters = _with_transfer(model, name, conf, linguistic_dim, sample_rate)
        taps = _taps(model, name, conf, sample_rate)
    macs, feedback_macs = count_macs_per_second(model, sample_rate)
    field = receptive_field(model, sample_rate)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes = {name: size for name, size in sizes.items() if not name.startswith("transfer.")}
    return {
        "sample_rate": sample_rate,
        "parameters": sum(sizes.values()),
        "transfer_parameters": transfer_parameters,
        "macs_per_second": macs,
        "receptive_field": {"past": field.past, "future": field.future},
        "latency": field.latency,
        "normalises": model.normalize_variance or model.normalize_variance_per_ch,
        "taps": taps,
        "feedback": _feedback(sizes, macs, feedback_macs),
    }


def _with_transfer(
    model, separator_name: str, conf: dict, linguistic_dim: int | None, sample_rate: int
):
    """Return the model as in training, and how many parameters its transfer has, if that is known.

    Without the width of the embeddings no transfer can be built; alpha = 1 builds none, and has
    the adapter none the less.
    """
    from cmkt.espnet_plugin.model import add_transfer

    if conf.get("linguistic_dim") is None:
        conf["linguistic_dim"] = linguistic_dim
    known = conf["linguistic_dim"] is not None or conf.get("alpha") == 1
    if conf["linguistic_dim"] is None:
        conf |= {"linguistic_dim": 1, "alpha": 1}
    model = add_transfer(model, separator_name, conf, {}, sample_rate)
    transfer = model.transfer
    count = 0 if transfer is None else sum(p.numel() for p in transfer.parameters())
    return model, count if known else None


def _taps(model, separator_name: str, conf: dict, sample_rate: int) -> list[dict]:
    """Return where the acoustic sequence is taken, and what the alignment is given of it."""
    from cmkt.espnet_plugin.listening import find_listeners
    from cmkt.espnet_plugin.taps import find_taps

    taps = find_taps(separator_name, model.separator, conf.get("tap", "auto"))
    listeners = find_listeners(
        model.encoder, model.separator, taps, conf.get("pooling"), sample_rate
    )
    return [
        {
            "module": one.tap.module,
            "side": one.tap.side,
            "layout": one.tap.layout,
            "width": one.width,
            "frames_per_second": one.frames_per_second,
        }
        for one in listeners
    ]


def _feedback(sizes: dict[str, int], macs: float, feedback_macs: float) -> dict | None:
    """Compare the adapter with the backbone.

    Args:
        sizes: {name: how many numbers} of the parameters.
        macs: per second, of the whole model.
        feedback_macs: per second, of the adapter.
    """
    size = sum(n for name, n in sizes.items() if name.startswith("separator.feedback."))
    if not size:
        return None
    separator = sum(n for name, n in sizes.items() if name.startswith("separator.")) - size
    return {
        "parameters": size,
        "macs_per_second": feedback_macs,
        "share_of_parameters": 100 * size / separator,
        "share_of_macs": 100 * feedback_macs / (macs - feedback_macs),
    }


def run_model(model, speech, sample_rate: int):
    """Enhance without ESPnet's conversion of lengths and levels.

    Args:
        model: an `ESPnetEnhancementModel` in evaluation mode.
        speech: (1, N) samples.
        sample_rate: in Hz, for encoders that scale their STFT with it.

    Returns:
        (1, N) samples.
    """
    import torch

    from cmkt.enhance.loading import RATE_AWARE

    rate = sample_rate if type(model.separator).__name__ in RATE_AWARE else None
    lengths = torch.tensor([speech.shape[1]])
    features, feature_lengths = model.encoder(speech, lengths, fs=rate)
    features, _, _ = model.separator(features, feature_lengths, {})
    return model.decoder(features[0], lengths, fs=rate)[0]


def model_rate(model, sample_rate: int) -> int:
    """Return the sampling rate that a model works at inside, in Hz."""
    from cmkt.enhance.loading import RATE_AWARE

    aware = type(model.separator).__name__ in RATE_AWARE
    return 48000 if model.always_forward_in_48k and not aware else sample_rate


def count_macs_per_second(model, sample_rate: int) -> tuple[float, float]:
    """Count the MACs of enhancing a second of audio, as the mean over `SECONDS`.

    Args:
        model: an `ESPnetEnhancementModel`; its recurrent layers are changed in place.
        sample_rate: in Hz.

    Returns:
        MACs per second of the whole model, and of its feedback adapter alone.
    """
    import torch

    from cmkt.espnet_plugin.recurrent import run_layer_by_layer

    speech = torch.randn(1, SECONDS * model_rate(model, sample_rate))
    model.eval()
    run_layer_by_layer(model)  # packed, an LSTM would be counted time step by time step: slowly
    counts = count_macs(lambda: run_model(model, speech, sample_rate))
    adapter = f"{type(model.separator).__name__}.feedback"
    return counts["Global"] / SECONDS, counts.get(adapter, 0) / SECONDS


def receptive_field(model, sample_rate: int) -> ReceptiveField:
    """Find how far a model looks back and ahead.

    Args:
        model: an `ESPnetEnhancementModel`; its weights are changed.
        sample_rate: in Hz.
    """
    make_recurrences_remember(model)
    model.double().eval()
    rate = model_rate(model, sample_rate)
    encoder = model.encoder
    hop = getattr(encoder, "hop_length", None) or getattr(encoder, "stride", 1)
    window = getattr(encoder, "win_length", None) or getattr(encoder, "kernel_size", 1)
    scale = rate / getattr(encoder, "default_fs", rate)  # of encoders told their rate
    return find_receptive_field(
        lambda speech: run_model(model, speech, sample_rate),
        rate,
        round(hop * scale),
        round(window * scale),
    )


def count_macs(function: Callable[[], object]) -> dict[str, int]:
    """Count the MACs of matrix products and convolutions, by torch's own counter.

    The counter takes fused operations that it does not know for nothing. Those of oneDNN's LSTM
    are told to it; fast attention, and the fast path that gradients keep away, are not used.

    Args:
        function: runs a model in evaluation mode, without arguments.

    Returns:
        {path of a module: MACs}; `Global` has them all.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def of_lstm(x, of_input, of_state, *_, **__) -> int:
        """Return the FLOPs from shapes (..., D), (4 H, D), (4 H, H): each step has two products."""
        return 2 * math.prod(x[:-1]) * (math.prod(of_input) + math.prod(of_state))

    known = {torch.ops.aten.mkldnn_rnn_layer: of_lstm}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
        function()
    return {name: sum(c.values()) // 2 for name, c in counter.get_flop_counts().items()}


def as_text(values: dict) -> str:
    """Return what `describe` has measured as lines to read."""
    size = values["transfer_parameters"]
    transfer = f"{size:,} parameters, in training only" if size else "none"
    if size is None:
        transfer = "in training only, of a size that depends on --linguistic_dim"
    taps = [
        f"{tap['side']} of separator.{tap['module']} (width {tap['width']}, "
        f"{tap['frames_per_second']:g} frames/s)"
        for tap in values["taps"]
    ]
    lines = {
        "sample rate": f"{values['sample_rate']} Hz",
        "parameters": f"{values['parameters']:,}",
        "transfer": transfer,
        "MACs per second": f"{values['macs_per_second'] / 1e6:,.2f} M",
        "receptive field": _reach(values["receptive_field"]),
        "latency": _latency(values),
        "tap": ", ".join(taps) or "none",
    }
    feedback = values["feedback"]
    if feedback:
        lines["feedback adapter"] = (
            f"{feedback['parameters']:,} parameters ({feedback['share_of_parameters']:.2f} % of "
            f"the separator), {feedback['macs_per_second'] / 1e6:,.2f} M MACs per second "
            f"({feedback['share_of_macs']:.2f} % of the rest)"
        )
    return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


def _reach(field: dict) -> str:
    """Say how far an output sample reaches into the input."""
    past, future = (
        f"{REACH} s or more" if field[side] is None else f"{field[side]:.3f} s"
        for side in ("past", "future")
    )
    return f"{past} back, {future} ahead"


def _latency(values: dict) -> str:
    """Say how long a sample must wait for its output, apart from the computation."""
    if values["latency"] is None:
        return "the whole signal (not causal)"
    level = ", after the level of the whole signal (normalize_variance)"
    return f"{values['latency']} ms{level if values['normalises'] else ''}"
