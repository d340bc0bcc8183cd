"""Tell how large a model is and what it costs to run.

Printed are the parameters of the enhancement model; those of the transfer, which only training
has; the multiply-accumulates (MACs) of a second of audio, as the mean over 4 s; the tap; and the
parameters and MACs of a feedback adapter, with their shares of the separator's parameters and of
the other MACs. MACs are those of matrix products and convolutions; Fourier transforms and
element-wise operations are left out.

    cmkt info conf/train_tcn_cmkt.yaml --linguistic_dim 384
    cmkt info exp/tcn_cmkt_minilm_seed0
    cmkt info exp/tcn_cmkt_minilm_seed0/export --json
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from cmkt.errors import CmktError
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
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> None:
    """Run `cmkt info`."""
    if args.linguistic_dim is not None and args.linguistic_dim < 1:
        raise CmktError("--linguistic_dim must be at least 1")
    values = describe(read_config(args.model), args.linguistic_dim)
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
        `linguistic_dim`), `macs_per_second`, `taps` (module, side and width of each) and
        `feedback` (`parameters`, `macs_per_second`, `share_of_parameters` and `share_of_macs` in
        per cent; None without adapter).

    Raises:
        CmktError: the model cannot be built.
    """
    from cmkt.enhance.export import find_sample_rate
    from cmkt.espnet_plugin.build import build_enhancement_model

    model, transfer_parameters, taps = build_enhancement_model(config), 0, []
    if config.get("transfer") == "cmkt":
        conf, name = dict(config["transfer_conf"]), config["separator"]
        model, transfer_parameters = _with_transfer(model, name, conf, linguistic_dim)
        taps = _taps(model, name, conf)
    sample_rate = find_sample_rate(config)
    macs, feedback_macs = count_macs_per_second(model, sample_rate)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes = {name: size for name, size in sizes.items() if not name.startswith("transfer.")}
    return {
        "sample_rate": sample_rate,
        "parameters": sum(sizes.values()),
        "transfer_parameters": transfer_parameters,
        "macs_per_second": macs,
        "taps": taps,
        "feedback": _feedback(sizes, macs, feedback_macs),
    }


def _with_transfer(model, separator_name: str, conf: dict, linguistic_dim: int | None):
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
    model = add_transfer(model, separator_name, conf, {})
    transfer = model.transfer
    count = 0 if transfer is None else sum(p.numel() for p in transfer.parameters())
    return model, count if known else None


def _taps(model, separator_name: str, conf: dict) -> list[dict]:
    """Return where the acoustic sequence is taken."""
    from cmkt.espnet_plugin.taps import find_taps, prepare_separator, tap_width

    taps = find_taps(separator_name, conf.get("tap", "auto"))
    prepare_separator(model.separator, taps)
    widths = [tap_width(model.encoder, model.separator, [tap]) for tap in taps]
    return [
        {"module": tap.module, "side": tap.side, "width": width}
        for tap, width in zip(taps, widths, strict=True)
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


def count_macs_per_second(model, sample_rate: int) -> tuple[float, float]:
    """Count the MACs of enhancing a second of audio, as the mean over `SECONDS`.

    Args:
        model: an `ESPnetEnhancementModel`; its recurrent layers are changed in place.
        sample_rate: in Hz.

    Returns:
        MACs per second of the whole model, and of its feedback adapter alone.
    """
    import torch

    from cmkt.enhance.loading import RATE_AWARE
    from cmkt.espnet_plugin.recurrent import run_layer_by_layer

    rate = sample_rate if type(model.separator).__name__ in RATE_AWARE else None
    wide = rate is None and model.always_forward_in_48k
    speech = torch.randn(1, SECONDS * (48000 if wide else sample_rate))
    lengths = torch.tensor([speech.shape[1]])

    def enhance():
        features, feature_lengths = model.encoder(speech, lengths, fs=rate)
        features, _, _ = model.separator(features, feature_lengths, {})
        model.decoder(features[0], lengths, fs=rate)

    model.eval()
    run_layer_by_layer(model)  # packed, an LSTM would be counted time step by time step: slowly
    counts = count_macs(enhance)
    adapter = f"{type(model.separator).__name__}.feedback"
    return counts["Global"] / SECONDS, counts.get(adapter, 0) / SECONDS


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
        f"{tap['side']} of separator.{tap['module']} (width {tap['width']})"
        for tap in values["taps"]
    ]
    lines = {
        "sample rate": f"{values['sample_rate']} Hz",
        "parameters": f"{values['parameters']:,}",
        "transfer": transfer,
        "MACs per second": f"{values['macs_per_second'] / 1e6:,.2f} M",
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
