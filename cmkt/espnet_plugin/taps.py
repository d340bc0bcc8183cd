"""Where the acoustic sequence is taken from a separator: the table of taps, and the look-up.

A tap names a module inside the separator, which side of it to read, and the layout found there.
`transfer_conf.tap` is `auto`, a name of the table, any module's path, a mapping
`{module: PATH, side: output, layout: BCTF}`, or several of these in a list. A new backbone joins
with one entry of `TAPS`; the first of its taps is the one `auto` picks. Names: `last` is after the
last block, `before_last` before it, `middle` after half of the blocks, `first` after the first one,
`encoder` before all of them.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from cmkt.errors import CmktError
from cmkt.espnet_plugin.layouts import axes_of
from cmkt.espnet_plugin.recurrent import run_layer_by_layer
from cmkt.transfer.settings import choice, unknown_key


@dataclass(frozen=True)
class Tap:
    """One place to listen.

    Args:
        module: path inside the separator, as `named_modules` spells it. A `*` in the table is the
            number of the block in the middle: the last of the first half to read its output, the
            first of the second half to read its input.
        side: `input` or `output` of that module.
        layout: see `layouts`; None: found when the model is built.
        lead: half segments of padding before the first frame, in a layout with segments.
        frames: path of the module whose output (..., T) is cut into segments; empty: the
            separator's input (B, T, ...) is.
    """

    module: str
    side: str = "output"
    layout: str | None = None
    lead: int = 1
    frames: str = ""

    def __str__(self):
        return f"{self.side} of {self.module}"


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
    "transformer": {
        "last": Tap("transformer", "output", "BTD"),
        "middle": Tap("transformer.encoders.*", "output", "BTD"),
    },
    "conformer": {
        "last": Tap("conformer", "output", "BTD"),
        "middle": Tap("conformer.encoders.*", "output", "BTD"),
    },
    "skim": {
        "last": Tap("skim.output_fc", "input", "BDT"),
        "middle": Tap("skim.seg_lstms.*", "output", "(BS)KD"),
    },
    "dc_crn": {
        "last": Tap("dc_crn.glstm", "output", "BCTF"),  # between convolutional encoder and decoder
        "encoder": Tap("dc_crn.glstm", "input", "BCTF"),
    },
    "dccrn": {
        "last": Tap("enhance", "output", "TBD"),  # real and imaginary part, if use_clstm
        "encoder": Tap("enhance", "input", "TBD"),
    },
    "bsrnn": {
        "last": Tap("bsrnn.mask_decoder", "input", "BCTF"),
        "middle": Tap("bsrnn.norm_time.*", "input", "BCTF"),
    },
    "tfgridnet": {
        "last": Tap("deconv", "input", "BCTF"),
        "middle": Tap("blocks.*", "output", "BCTF"),
    },
    "tfgridnetv2": {
        "last": Tap("deconv", "input", "BCTF"),
        "middle": Tap("blocks.*", "output", "BCTF"),
    },
    "tfgridnetv3": {
        "last": Tap("deconv", "input", "BCTF"),
        "middle": Tap("blocks.*", "output", "BCTF"),
    },
    # Their blocks run once for each segment, with memory tokens in front of the frames.
    "uses": {"last": Tap("uses.output", "input", "BCFT")},
    "uses2": {"last": Tap("uses.output", "input", "BCFT")},
    "dprnn": {
        "last": Tap("dprnn.output", "input", "BCKS"),
        "middle": Tap("dprnn.row_rnn.*", "input", "(BS)KC"),
    },
    "dptnet": {
        "last": Tap("dptnet.output", "input", "BCKS", lead=2),
        "middle": Tap("dptnet.row_transformer.*", "input", "(BS)KC", lead=2),
    },
    "svoice": {
        "last": Tap("rnn_model.output", "input", "BCKS", frames="encoder"),
        "middle": Tap("rnn_model.rows_grnn.*", "input", "(BS)KC", frames="encoder"),
    },
    "dpcl_e2e": {
        "last": Tap("enh_blstm", "output", "BTD"),
        "first": Tap("blstm", "output", "BTD"),
    },
    "blstm_sum": {"before_last": Tap("tap", "output", "BTD")},
    "dense_dual_path": {"before_last": Tap("tap", "output", "BCTF")},
    "mp_senet": {"before_last": Tap("tap", "output", "BCTF")},
    "gtcrn": {"before_last": Tap("tap", "output", "BCTF")},
}

# Separators without an entry above, and why.
CLUSTERS = "it clusters by speaker, and with one speaker its mask is 1 everywhere"
MICROPHONES = "it takes several microphones"
UNTAPPED: dict[str, str] = {
    "asteroid": "its network is any of Asteroid's, whose modules have different names",
    "dan": CLUSTERS,
    "dpcl": CLUSTERS,
    "fasnet": MICROPHONES,
    "ineube": MICROPHONES,
    "wpe_beamformer": f"{MICROPHONES}; with one, only its dereverberation runs",
    "tcn_nomask": "it makes features for a diarisation, no enhanced speech",
}


def find_taps(
    separator_name: str, separator: torch.nn.Module, entries: str | Mapping | Sequence = "auto"
) -> list[Tap]:
    """Look taps up, and make the places between the layers of a recurrent network reachable.

    Args:
        separator_name: as in the YAML, for example `rnn`.
        separator: of that name. If a path has `.after.` in it, its LSTMs and GRUs run layer by
            layer from now on.
        entries: `transfer_conf.tap`.

    Returns:
        the taps, each once; layouts of free paths are still open.

    Raises:
        CmktError: no such name or module, or an entry of the wrong form.
    """
    if isinstance(entries, str | Mapping):
        entries = [entries]
    elif not isinstance(entries, Sequence):
        raise CmktError(f"transfer_conf.tap must be a name, a mapping or a list, not {entries!r}")
    taps = [_look_up(separator_name, entry) for entry in entries or ["auto"]]
    if any(".after." in tap.module for tap in taps):
        run_layer_by_layer(separator)
    taps = [_in_the_middle(separator, tap) for tap in taps]
    for tap in taps:
        if tap.module not in dict(separator.named_modules()) or not tap.module:
            raise _no_such_module(separator_name, separator, tap.module)
    return list(dict.fromkeys(taps))


def _look_up(separator_name: str, entry: str | Mapping) -> Tap:
    """Return the tap of one entry of `transfer_conf.tap`."""
    if isinstance(entry, Mapping):
        return _read_mapping(entry)
    if not isinstance(entry, str):
        raise CmktError(f"transfer_conf.tap: an entry must be a name or a mapping, not {entry!r}")
    taps = TAPS.get(separator_name, {})
    if entry != "auto":
        return taps.get(entry) or Tap(entry)
    if not taps:
        reason = UNTAPPED.get(separator_name, "it has no entry in cmkt/espnet_plugin/taps.py")
        raise CmktError(
            f"separator {separator_name} has no tap of its own: {reason}",
            remedy="give the path of a module as transfer_conf.tap (docs/new_backbone.md)",
        )
    return next(iter(taps.values()))


def _read_mapping(entry: Mapping) -> Tap:
    """Return the tap of `{module: PATH, side: output, layout: BCTF}`."""
    known = ("module", "side", "layout")
    for key in entry:
        if key not in known:
            raise CmktError(f"transfer_conf.tap: {unknown_key(key, known)}")
    module, layout = entry.get("module"), entry.get("layout")
    if not isinstance(module, str):
        raise CmktError(f"transfer_conf.tap: {dict(entry)} needs `module`, a path")
    try:
        side = choice("tap.side", entry.get("side", "output"), ("input", "output"))
        if layout is not None and set("KS") & set("".join(axes_of(layout))):
            raise ValueError("tap.layout: segments (K, S) are only for the taps of the table")
    except ValueError as error:
        raise CmktError(f"transfer_conf.{error}") from error
    return Tap(module, side, layout)


def _in_the_middle(separator: torch.nn.Module, tap: Tap) -> Tap:
    """Put the number of the middle block in the place of `*`."""
    if "*" not in tap.module:
        return tap
    blocks = len(separator.get_submodule(tap.module.partition(".*")[0]))
    number = blocks // 2 if tap.side == "input" else max(blocks // 2, 1) - 1
    return replace(tap, module=tap.module.replace("*", str(number)))


def nearest(word: str, names: Sequence[str], count: int = 5) -> list[str]:
    """Return the names that are most like a word; those with the same end come first.

    Args:
        word: a name or a path.
        names: to choose from.
        count: how many at most.
    """
    last = word.rpartition(".")[2]
    alike = [name for name in names if name.rpartition(".")[2] == last]
    similar = [*difflib.get_close_matches(word, alike, count, 0.0),
               *difflib.get_close_matches(word, names, count, 0.0)]  # fmt: skip
    return list(dict.fromkeys(similar))[:count]


def _no_such_module(separator_name: str, separator: torch.nn.Module, module: str) -> CmktError:
    names = list(TAPS.get(separator_name, {}))
    paths = [path for path, _ in separator.named_modules() if path]
    known = f"auto, {', '.join(names)} or a path" if names else "a path"
    return CmktError(
        f"transfer_conf.tap: separator {separator_name} has no tap or module {module!r}",
        remedy=f"use {known}; the nearest are {', '.join(nearest(module, names + paths))}",
    )
