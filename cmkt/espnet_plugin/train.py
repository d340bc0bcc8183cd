"""Collect statistics (--collect_stats true, stage 4) or train (stage 5).

Every option of ESPnet's `enh_train` is taken as well (`--max_epoch 3`, `--ngpu 1`, `--init_param`,
...); `cmkt train --print_config` lists them all. The options below spare writing out ESPnet's
data triplets; those can be given instead. Training goes on from its last epoch when it was
killed; with other data or settings, the old experiment is moved aside and training starts anew.

The sampling rate is that of the mixtures. Where the YAML was written for another `sample_rate`, its
windows, hops and kernels are scaled, so that they last as long as at that rate.

With --size the model and the training have another size than in the YAML; `--size tiny` is for
trials on a CPU. Give such trainings an experiment folder of their own.

With --mixing_config the training data is mixed anew in each epoch, from the speech, noise and rooms
that `cmkt mix --online` has listed in --train_dir.
"""

import argparse
import difflib
import io
import json
import logging
import re
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import yaml

from cmkt.corpus.datadir import read_table
from cmkt.corpus.word_times import CTM
from cmkt.errors import CmktError
from cmkt.espnet_plugin.rivals import recognisers
from cmkt.espnet_plugin.sizes import apply_size
from cmkt.espnet_plugin.tokens import FOLDER as TOKEN_IDS
from cmkt.settings import read_mapping
from cmkt.stage import MARKER, Stage

PASS_THROUGH = True

# On which and how many processes; not what is made.
PROCESSES = {"multiprocessing_distributed", "local_rank"} | {
    f"dist_{name}"
    for name in ("backend", "init_method", "world_size", "rank", "master_addr", "master_port",
                 "launcher")
}  # fmt: skip
# Separators with bands, or an encoder of their own, for one sampling rate.
BOUND_TO_RATE = ("bsrnn", "svoice")
# Keys of a separator with an STFT of its own, in samples.
OWN_TRANSFORM = {"tfgridnet": ("n_fft", "stride"), "tfgridnetv2": ("n_fft", "stride")}
# What may change between two runs of one training without making it another training.
NOT_IDENTITY = {"max_epoch", "ngpu", "num_workers", "log_interval", "log_level"}


def add_arguments(parser):
    """Add the options of `cmkt train`."""
    parser.add_argument(
        "--config", type=Path, help="training YAML, for example conf/train_blstm.yaml"
    )
    parser.add_argument("--size", help="another size of the YAML's model, for example tiny, which "
                        "size/tiny.yaml beside the YAML holds")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, help="experiment or statistics folder")
    parser.add_argument("--train_dir", type=Path, help="mixture directory to train on (stage 2)")
    parser.add_argument("--valid_dir", type=Path, help="mixture directory to validate on (stage 2)")
    parser.add_argument("--llm_dir", type=Path, help="linguistic stores dump/llm/<tag> (stage 3)")
    parser.add_argument("--stats_dir", type=Path, help="folder of --collect_stats (stage 4)")
    parser.add_argument(
        "--mixing_config", type=Path, help="on-the-fly mixing, for example conf/mixing/noise.yaml"
    )
    parser.add_argument("--collect_stats", default="false", choices=["true", "false"],
                        help="only collect utterance lengths (default: false)")  # fmt: skip


def run(args, rest: list[str]) -> None:
    """Run `cmkt train`.

    Args:
        args: the options of `add_arguments`.
        rest: ESPnet's options.

    Raises:
        CmktError: bad settings or missing inputs, before any data is read.
    """
    if "--print_config" in rest:
        _task().main(cmd=["--print_config"])
    if args.output_dir is None:
        raise CmktError("--output_dir is not given")
    collect = args.collect_stats == "true"
    config = _read_config(args.config)
    if args.size is not None:
        if args.config is None:
            raise CmktError("--size needs --config", remedy="it changes a training YAML")
        config = apply_size(config, args.config, args.size)
    options = {"config": config, **_pairs(rest)}
    options = {key: value for key, value in options.items() if key not in PROCESSES}
    told = config.get("transfer", "none")
    wanted = options["transfer"][-1] if options.get("transfer") else told
    if wanted == told:  # `--transfer none` leaves a baseline the same training
        options.pop("transfer", None)
    transfer = wanted == "cmkt" and not collect
    command, inputs = _espnet_command(args, rest, transfer, collect)
    inputs += recognisers(config.get("criterions") or [])
    mixing = _mixing(args) if not collect else {}
    if mixing:
        options["mixing"] = mixing
    stage = Stage(args.output_dir, inputs, {**options, "collect_stats": collect})
    if stage.is_done():
        print(f"{args.output_dir}: up to date")
        return
    task = _task()
    parsed = _parse(task, command, args.config, config if args.size is not None else None)
    stated = "sample_rate" in config or "sample_rate" in options
    written_for = parsed.sample_rate
    fit_sample_rate(parsed, _rate_of(args.train_dir), stated)
    if stated and parsed.sample_rate != written_for:
        print(
            f"{args.config}: windows and hops scaled from {written_for} to {parsed.sample_rate} Hz"
        )
    if mixing:
        parsed.mixing_conf = mixing
        parsed.noise_scp = str(args.train_dir / "noise.scp")
        rooms = args.train_dir / "rir.scp"
        parsed.rir_scp = str(rooms) if rooms.exists() else None
    if args.train_dir and (args.train_dir / CTM).exists():
        parsed.word_times = parsed.word_times or str(args.train_dir / CTM)
    if transfer and args.llm_dir:
        from cmkt.espnet_plugin.tokens import find_vocabulary, write_token_ids, write_vocabulary
        from cmkt.linguistic.store import STATISTICS, check_arks, read_meta, require_same_meta

        stores = [args.llm_dir / folder.name for folder in (args.train_dir, args.valid_dir)]
        require_same_meta(*stores)
        for store in stores:
            check_arks(store)
        vocabulary = find_vocabulary(stores[0])
        meta = read_meta(stores[0])
        parsed.linguistic_meta = meta
        parsed.linguistic_statistics = str(stores[0] / STATISTICS)
        parsed.linguistic_tokens = str(stores[0] / "tokens")
        sizes = {"linguistic_dim": meta["dimension"], "vocabulary": len(vocabulary) + 1}
        parsed.transfer_conf = {**parsed.transfer_conf, **sizes}
    if collect:
        with stage.working_directory() as work, redirect_stderr(io.StringIO()):
            parsed.output_dir = str(work)
            task.main(args=parsed)
        return
    if not _is_leader(parsed):  # another process prepares the folder, logs and finishes
        task.main(args=parsed)
        return
    identity = {key: value for key, value in options.items() if key not in NOT_IDENTITY}
    identity["config"] = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    _prepare(args.output_dir, Stage(args.output_dir, inputs, identity).fingerprint)
    if transfer and args.llm_dir:
        write_vocabulary(vocabulary, args.output_dir / TOKEN_IDS)
        for mode, folder in (("train", args.train_dir), ("valid", args.valid_dir)):
            utterances = list(read_table(folder / "wav.scp"))
            path = args.output_dir / TOKEN_IDS / mode
            write_token_ids(args.llm_dir / folder.name, utterances, vocabulary, path)
    with open(args.output_dir / "train.log", "a") as log, redirect_stderr(log):
        log_to(log, args.output_dir.name)
        task.main(args=parsed)
    stage.finish()


def _mixing(args) -> dict:
    """Read --mixing_config, and see that --train_dir was made for it or for no such thing."""
    online = args.train_dir is not None and _options_of(args.train_dir).get("online", False)
    if args.mixing_config is None:
        if online:
            raise CmktError(
                "holds clean speech for on-the-fly mixing", args.train_dir,
                remedy="give --mixing_config, or run stage 2 without it",
            )  # fmt: skip
        return {}
    if not online:
        where = args.train_dir or "--train_dir"
        raise CmktError("no speech for on-the-fly mixing", where, remedy="cmkt mix --online")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from cmkt.espnet_plugin.mixing import read_mixing_config
    return read_mixing_config(args.mixing_config)


def _options_of(folder: Path) -> dict:
    """Return the options that a finished stage was run with."""
    marker = folder / MARKER
    return json.loads(marker.read_text(encoding="utf-8"))["options"] if marker.exists() else {}


def _rate_of(folder: Path | None) -> int | None:
    return None if folder is None else _options_of(folder).get("fs")


def fit_sample_rate(args: argparse.Namespace, fs: int | None, stated: bool) -> None:
    """Scale a configuration to the sampling rate of the data.

    Args:
        args: ESPnet's options, changed in place: the STFT or convolution of encoder, decoder,
            separator and losses, `fold_length`, `batch_bins` and `sample_rate`.
        fs: of the data, in Hz; None where it is not known.
        stated: whether `sample_rate` is the user's word; ESPnet's default of 8000 says nothing.

    Raises:
        CmktError: a length that is no whole number of samples at this rate, or a separator that is
            for one rate only.
    """
    if fs is None or not stated:
        args.sample_rate = fs or args.sample_rate
        return

    def scaled(key: str, value: int) -> int:
        if value * fs % args.sample_rate:
            raise CmktError(
                f"{key} {value} at {args.sample_rate} Hz is no whole number at {fs} Hz",
                getattr(args, "config", None),
                remedy="write a configuration for this rate, with its sample_rate",
            )
        return value * fs // args.sample_rate

    losses = [criterion.get("conf") or {} for criterion in args.criterions]
    for conf in (args.encoder_conf, args.decoder_conf, *losses):
        for key in ("n_fft", "win_length", "hop_length", "kernel_size", "stride"):
            if conf.get(key):
                conf[key] = scaled(key, conf[key])
        if "default_fs" in conf:
            conf["default_fs"] = fs
    if args.separator in BOUND_TO_RATE and fs != args.sample_rate:
        raise CmktError(
            f"separator {args.separator} is laid out for {args.sample_rate} Hz, the data has {fs}",
            getattr(args, "config", None),
            remedy="write a configuration for this rate, with its sample_rate",
        )
    for key in OWN_TRANSFORM.get(args.separator, ()):
        if args.separator_conf.get(key):
            args.separator_conf[key] = scaled(key, args.separator_conf[key])
    if "sample_rate" in args.separator_conf:
        args.separator_conf["sample_rate"] = fs
    args.fold_length = [scaled("fold_length", length) for length in args.fold_length]
    for key in ("batch_bins", "valid_batch_bins"):  # a number of samples, not of any frames
        if getattr(args, key):
            setattr(args, key, getattr(args, key) * fs // args.sample_rate)
    args.sample_rate = fs


def _task():
    # ESPnet 202511 greets every import with warnings and failed downloads of its text front end.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from cmkt.espnet_plugin.task import TransferEnhancementTask

    return TransferEnhancementTask


def _is_leader(parsed: argparse.Namespace) -> bool:
    from cmkt.espnet_plugin.processes import is_leader

    return is_leader(parsed)


def _read_config(path: Path | None) -> dict:
    return {} if path is None else read_mapping(path, "training configuration", "see conf/")


def _pairs(rest: list[str]) -> dict:
    """Turn `--a 1 2 --b 3` into {a: [1, 2], b: [3]} for the fingerprint."""
    pairs: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = pairs.setdefault(name, [])
            if equals:
                current.append(value)
        elif pairs:
            current.append(word)
    return pairs


def _espnet_command(args, rest, transfer: bool, collect: bool) -> tuple[list[str], list[Path]]:
    """Write the options out as ESPnet's, and list the inputs of the stage."""
    command = ["--config", str(args.config)] if args.config else []
    command += ["--output_dir", str(args.output_dir), "--collect_stats", str(collect).lower()]
    inputs: list[Path] = []
    for mode, folder in (("train", args.train_dir), ("valid", args.valid_dir)):
        if folder is None:
            continue
        if not (folder / MARKER).exists():
            raise CmktError("no finished mixture directory", folder, remedy="run stage 2")
        inputs.append(folder)
        triplets = [f"{folder}/wav.scp,speech_mix,sound", f"{folder}/spk1.scp,speech_ref1,sound"]
        if transfer and args.llm_dir:
            store = args.llm_dir / folder.name
            if not (store / MARKER).exists():
                raise CmktError("no finished linguistic store", store, remedy="run stage 3")
            inputs.append(store)
            triplets.append(f"{store}/linguistic.scp,linguistic,linguistic_ark")
            triplets.append(f"{args.output_dir}/{TOKEN_IDS}/{mode},token_ids,text_int")
        for triplet in triplets:
            command += [f"--{mode}_data_path_and_name_and_type", triplet]
        if collect:
            command += [f"--{mode}_shape_file", f"{folder}/wav.scp"]
        elif args.stats_dir:
            shapes = args.stats_dir / mode / "speech_mix_shape"
            if not (args.stats_dir / MARKER).exists():
                raise CmktError("no finished statistics", args.stats_dir, remedy="run stage 4")
            command += [f"--{mode}_shape_file", str(shapes)]
    if args.stats_dir and not collect:
        inputs.append(args.stats_dir)
    return command + rest, inputs


def _parse(task, command: list[str], config: Path | None, sized: dict | None = None):
    """Parse ESPnet's options; errors are one line and name the YAML's line.

    Args:
        task: whose options they are.
        command: ESPnet's options, with `--config`.
        config: the YAML given there.
        sized: what to take instead of its contents, at another size.
    """
    parser = task.get_parser()
    known = {action.dest for action in parser._actions}

    def fail(message: str):
        raise CmktError(message, config, remedy="`cmkt train --print_config` lists all options")

    for key in _read_config(config):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise CmktError(
                f"unknown key {key}",
                config,
                _line_of(config, key),
                f"did you mean {near[0]}?" if near else "see `cmkt train --print_config`",
            )
    parser.error = fail
    if sized is None:
        return parser.parse_args(command)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as merged:
        yaml.safe_dump(sized, merged)
        merged.flush()
        parsed = parser.parse_args([*command, "--config", merged.name])
    parsed.config = str(config)
    return parsed


def _line_of(config: Path, key: str) -> int | None:
    lines = config.read_text(encoding="utf-8").splitlines()
    return next((n for n, line in enumerate(lines, 1) if line.startswith(f"{key}:")), None)


def _prepare(output: Path, identity: str) -> None:
    """Make the experiment folder fit to begin, or to go on where a killed run stopped."""
    begun = output / ".begun"
    if output.exists() and begun.exists() and begun.read_text() != identity:
        aside = output.with_name(f"{output.name}.old-{begun.read_text()[:8]}")
        number = 1
        while aside.exists():
            number += 1
            aside = output.with_name(f"{output.name}.old-{begun.read_text()[:8]}-{number}")
        output.rename(aside)
        print(f"{output}: data or settings changed; the old experiment is now {aside}")
    elif (output / "checkpoint.pth").exists() and not begun.exists():
        raise CmktError("holds an experiment of another program", output, remedy="choose another")
    output.mkdir(parents=True, exist_ok=True)
    begun.write_text(identity)
    checkpoint = output / "checkpoint.pth"
    if not checkpoint.exists():
        return
    # ESPnet saves in place, so a kill can leave half a file. A training is determined by its
    # seed, so starting over loses time only.
    if not zipfile.is_zipfile(checkpoint):
        print(f"{checkpoint}: cut short by a kill; training starts over")
        for path in [checkpoint, *output.glob("*epoch.pth")]:
            path.unlink()
        return
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    latest = output / f"{state['reporter']['epoch']}epoch.pth"
    if not zipfile.is_zipfile(latest):  # killed between the checkpoint and the epoch's model
        torch.save(state["model"], latest)


class _EpochLines(logging.Formatter):
    """Shorten ESPnet's `3epoch results: [train] ..., [valid] ...` to one readable line."""

    def __init__(self, name: str):
        super().__init__()
        self.experiment = name

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for the terminal."""
        train, _, valid = record.getMessage().partition("[valid]")
        epoch = train.partition("epoch")[0]
        if not valid:
            return f"{self.experiment}: {record.getMessage()}"

        def value(text: str, key: str) -> str:
            number = re.search(rf"\b{key}=([-+.\dena]+)", text)
            return number.group(1) if number else "?"

        line = f"{self.experiment}: epoch {epoch}: loss_se train {value(train, 'loss_se')}"
        line += f" valid {value(valid, 'loss_se')}"
        if "transfer_gap" in valid:
            line += f", transfer_gap {value(valid, 'transfer_gap')}"
        return line


def _for_terminal(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "epoch results:" in record.getMessage()


def log_to(log: TextIO, name: str) -> None:
    """Send ESPnet's full log to a file and one line an epoch to the terminal."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    to_file = logging.StreamHandler(log)
    to_file.setFormatter(logging.Formatter("%(asctime)s (%(module)s) %(levelname)s: %(message)s"))
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setFormatter(_EpochLines(name))
    to_terminal.addFilter(_for_terminal)
    root.handlers = [to_file, to_terminal]
