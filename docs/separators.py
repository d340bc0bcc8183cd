"""Write docs/separators.md, the table of separators and taps: `python docs/separators.py`.

Everything in it is measured: layouts, widths and frame rates on the models of conf/, causality on
tiny models (tests/tiny_separators.py) by changing the end of a signal.
"""

import sys
import warnings
from pathlib import Path

import torch
import yaml

from cmkt.espnet_plugin.build import OWN_SEPARATORS, SEPARATORS, build_enhancement_model
from cmkt.espnet_plugin.listening import Listener, find_listeners
from cmkt.espnet_plugin.taps import TAPS, UNTAPPED, find_taps

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))
from tiny_separators import separator_config  # noqa: E402

CONFIGURATIONS = {"rnn": "blstm"}  # where the file has another name than the separator
# What makes a separator causal, if anything does. The clustering of dpcl_e2e is over all frames.
CAUSAL = {
    "rnn": {"rnn_type": "lstm"},
    "tcn": {"causal": True, "norm_type": "cLN"},
    "skim": {"causal": True},
    "bsrnn": {"causal": True, "norm_type": "cfLN"},
    "dprnn": {"bidirectional": False},
    "dptnet": {"bidirectional": False, "norm_type": "cLN"},
    "svoice": {"bidirectional": False},
    "uses": {"bidirectional": False},
}
WINDOW = 128  # samples: that of the tiny models' STFT, longer than their convolutions
UNPOOLED = {"frames_per_second": None, "width": None}
HEADER = """# Separators and their taps

Written by `python docs/separators.py`. `tap: auto` takes the first tap of a separator; how to tap
any other module: [new_backbone.md](new_backbone.md).

- **module, layout**: the activation that is heard, and its axes: `B` batch, `T` frames, `F`
  frequency, `C` and `D` channels; `K` and `S` a place in a segment and the segment's number.
- **at the tap**: numbers in a frame (channels x bands), and frames per second. **aligned**: what is
  left of them with the default `pooling` (512 numbers, 125 frames per second).
- **causal**: whether a sample of the output stays the same when the input changes later than one
  analysis window after it, and the keys of `separator_conf` that this takes. Beside it,
  `normalize_variance: true` needs the whole signal.

Sizes are those of the configuration in `conf/` that is named. Where none is, they are those of a
tiny model.

| separator | configuration | tap | module, layout | at the tap | aligned | causal |
|---|---|---|---|---|---|---|
"""


def load(name: str) -> tuple[dict, str]:
    """Return the configuration of a separator and its name; a tiny one where conf/ has none."""
    path = REPOSITORY / "conf" / f"train_{CONFIGURATIONS.get(name, name)}.yaml"
    if path.exists():
        return yaml.safe_load(path.read_text(encoding="utf-8")), f"`{path.name}`"
    return separator_config(name), "tiny"


def listeners_of(model, config: dict, tap: str, pooling: dict | None) -> Listener:
    """Return what is found out about one tap."""
    taps = find_taps(config["separator"], model.separator, tap)
    return find_listeners(model.encoder, model.separator, taps, pooling, config["sample_rate"])[0]


@torch.no_grad()
def is_causal(config: dict) -> bool:
    """Make the second half of a signal another and louder, and compare what comes out before."""
    torch.manual_seed(0)
    model = build_enhancement_model(config).eval()
    speech = torch.randn(2, 1, 4000)
    one, other = speech[0], torch.cat([speech[0, :, :2000], 10 * speech[1, :, 2000:]], -1)
    outputs = [model.forward_enhance(x, torch.tensor([4000]), {})[0][0] for x in (one, other)]
    apart = (outputs[0] - outputs[1]).abs()[0] / outputs[0].abs().max()
    assert apart[2000:].max() > 1e-3, "the change is not heard at all"
    return bool(apart[: 2000 - WINDOW].max() < 1e-6)


def causality(name: str) -> str:
    """Return `yes`, `no`, or what it takes."""
    config = separator_config(name)
    if name == "skim":
        config["separator_conf"] = {**config["separator_conf"], "causal": False}
    if is_causal(config):
        return "yes"
    options = CAUSAL.get(name)
    if options:
        config["separator_conf"] = {**config["separator_conf"], **options}
        if is_causal(config):
            words = ", ".join(f"{key}: {value}" for key, value in options.items())
            return f"with `{words.replace('True', 'true').replace('False', 'false')}`"
    return "no"


def rows(name: str) -> list[str]:
    """Return the lines of a separator, one for each tap."""
    config, origin = load(name)
    model = build_enhancement_model(config)
    ours = " (ours)" if name in OWN_SEPARATORS else ""
    first, causal, lines = f"`{name}`{ours}", causality(name), []
    for tap in TAPS[name]:
        raw, pooled = (listeners_of(model, config, tap, pooling) for pooling in (UNPOOLED, None))
        size = f"{raw.channels} x {raw.bands}" if raw.bands > 1 else f"{raw.width}"
        cells = [
            first,
            origin,
            f"`{tap}`",
            f"{raw.tap.side} of `{raw.tap.module}`, {raw.tap.layout}",
            f"{size}, {raw.rate:g}/s",
            f"{pooled.width}, {pooled.frames_per_second:g}/s",
            causal,
        ]
        lines.append(f"| {' | '.join(cells)} |")
        first = origin = causal = ""
    return lines


def write_table() -> None:
    """Write docs/separators.md."""
    names = [name for name in sorted(SEPARATORS) + sorted(OWN_SEPARATORS) if name in TAPS]
    lines = [line for name in names for line in rows(name)]
    reasons = [f"- `{name}`: {UNTAPPED[name]}." for name in sorted(UNTAPPED) if name in SEPARATORS]
    text = HEADER + "\n".join(lines)
    text += "\n\nThese have no tap of their own; `tap` takes the path of a module all the same:\n\n"
    (REPOSITORY / "docs" / "separators.md").write_text(
        text + "\n".join(reasons) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write_table()
