"""Write the results of all experiments as Markdown, with plots.

Tables per test set and per SNR with the noisy input first, paired differences between each model
with knowledge transfer and its baseline, transfer diagnostics, training curves and attention
maps; then the command, versions and commit that they come from. Run it in the recipe's folder.
"""

import argparse
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.espnet_plugin.rivals import RIVALS
from cmkt.evaluate.results import (
    NOISY,
    Run,
    baseline_of,
    collect_runs,
    controls_of,
    difference_of,
    group_systems,
    mean_of,
    read_config,
    split_tag,
)
from cmkt.stage import atomic_file

# Packages whose version can change the numbers.
PACKAGES = ("cmkt", "espnet", "torch", "transformers", "numpy", "scipy", "pesq", "pystoi")
NAMED_FAILURES = 10

# Columns of the training tables: what was logged, and its title.
LOSSES = {name: name for name in ("loss_se", "cos_matched", "cos_mismatched", "transfer_gap")}
DIAGNOSTICS = {
    "retrieval_top1": "retrieval, first",
    "retrieval_top1_mismatched": "mismatched",
    "retrieval_top5": "first five",
    "retrieval_top5_mismatched": "mismatched",
    "alignment_entropy": "entropy",
    "alignment_monotonicity": "monotonicity",
    "gradient_share": "gradient share",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cmkt report`."""
    parser.add_argument("--expdir", default="exp", help="experiments (default: %(default)s)")
    parser.add_argument(
        "--dumpdir", default="dump", help="mixtures, in audio/<set> (default: %(default)s)"
    )
    parser.add_argument(
        "--output", default="RESULTS.md", help="file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--llm_dir",
        help="LLM features, for the token labels of attention maps (default: no attention maps)",
    )
    parser.add_argument(
        "--valid_set", default="valid", help="set of the attention maps (default: %(default)s)"
    )
    parser.add_argument(
        "--attention_utterances",
        type=int,
        default=3,
        help="attention maps per model (default: %(default)s)",
    )
    parser.add_argument("--command", help="the command to name as the origin of the results")


def run(args: argparse.Namespace) -> None:
    """Run `cmkt report`."""
    expdir, output = Path(args.expdir), Path(args.output)
    runs = collect_runs(expdir)
    configs = {tag: read_config(expdir, tag) for tag in dict.fromkeys(r.tag for r in runs)}
    has_transfer = {split_tag(tag)[0]: is_guided(config) for tag, config in configs.items()}
    test_sets = {
        name: group_systems([run for run in runs if run.test_set == name], has_transfer)
        for name in sorted({run.test_set for run in runs})
    }
    plots = expdir / "report"
    sections = ["# Results"]
    for name, systems in test_sets.items():
        sections += scores_section(name, systems, has_transfer)
    sections += training_section(expdir, configs, plots, output)
    sections += text_section(configs)
    sections += attention_section(args, configs, plots)
    sections += origin_section(args.command)
    with atomic_file(output) as stream:
        stream.write("\n\n".join(sections) + "\n")
    for name, systems in test_sets.items():
        print(f"{name}:\n{plain_table(systems)}\n")
    print(f"written to {output}")


def is_guided(config: dict) -> bool:
    """Whether a training has the transfer, or a rival of it, beside its enhancement loss."""
    rivals = {criterion.get("name") for criterion in config.get("criterions") or []} & {*RIVALS}
    return config.get("transfer") not in (None, "none") or bool(rivals)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    # A bar inside a cell would start another one.
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def interval_cell(interval, decimals: int, sign: bool = False) -> str:
    """Format a mean with its interval, `-` where there is none.

    Args:
        interval: an `Interval` or None.
        decimals: digits after the point.
        sign: write a plus sign too, and say when a difference may be 0.
    """
    if interval is None:
        return "-"
    form = f"{{:{'+' if sign else ''}.{decimals}f}}".format
    cell = form(interval.mean)
    if interval.low is None:
        return f"{cell} (one utterance)"
    cell += f" [{form(interval.low)}, {form(interval.high)}]"
    return f"{cell} includes 0" if sign and interval.includes_zero else cell


def seeds_cell(runs: list[Run]) -> str:
    """List the seeds of a system's trainings."""
    return ", ".join(str(run.seed) for run in runs if run.seed is not None) or "-"


def score_rows(systems: dict[str, list[Run]], metrics: list[str], snr: str | None) -> list[list]:
    """One row per system: name, a cell per metric, n, utterances with failures, seeds."""
    from cmkt.evaluate.metrics import METRICS

    rows = []
    for name, runs in systems.items():
        means = [mean_of(runs, metric, snr) for metric in metrics]
        total = [u for u in runs[0].utterances if snr in (None, runs[0].snr_group.get(u))]
        failed = {u for run in runs for u in run.failures} & set(total)
        cells = [
            interval_cell(mean, METRICS[metric].decimals)
            for mean, metric in zip(means, metrics, strict=True)
        ]
        rows.append([name, *cells, str(len(total)), str(len(failed)), seeds_cell(runs)])
    return rows


def _metrics_of(systems: dict[str, list[Run]]) -> list[str]:
    """Return the metrics that any system has, in the usual order."""
    from cmkt.evaluate.metrics import METRICS

    scored = {metric for runs in systems.values() for run in runs for metric in run.values}
    return [metric for metric in METRICS if metric in scored]


def _snrs_of(systems: dict[str, list[Run]]) -> list[str]:
    groups = {g for runs in systems.values() for run in runs for g in run.snr_group.values()}
    return sorted(groups, key=float)


def scores_section(
    name: str, systems: dict[str, list[Run]], has_transfer: dict[str, bool]
) -> list[str]:
    """Write the scores of one test set: overall, per SNR, differences, failures.

    Args:
        name: of the test set.
        systems: runs by system, in the order of the rows.
        has_transfer: by system.
    """
    from cmkt.evaluate.metrics import METRICS

    metrics, snrs = _metrics_of(systems), _snrs_of(systems)
    header = ["system", *(METRICS[m].label for m in metrics), "n", "failed", "seeds"]
    sections = [
        f"## Test set {name}",
        "Mean over utterances and seeds with its 95 % bootstrap interval, higher is better. n: "
        "utterances; failed: of these, left out of at least one mean. With one seed an interval "
        "does not cover the spread between trainings.",
        markdown_table(header, score_rows(systems, metrics, None)),
    ]
    failures = failure_list(systems)
    if failures:
        sections.append(failures)
    for snr in snrs if len(snrs) > 1 else []:
        sections += [
            f"### {name} at {snr} dB SNR",
            markdown_table(header, score_rows(systems, metrics, snr)),
        ]
    return sections + difference_section(name, systems, has_transfer)


def failure_list(systems: dict[str, list[Run]]) -> str:
    """Name the utterances that failed, the first ten of each run."""
    lines = []
    for runs in systems.values():
        for run in runs:
            failed = list(run.failures.items())
            lines += [f"- {run.tag}: {u}: {reason}" for u, reason in failed[:NAMED_FAILURES]]
            if len(failed) > NAMED_FAILURES:
                lines.append(f"- {run.tag}: and {len(failed) - NAMED_FAILURES} more")
    return "Failures:\n\n" + "\n".join(lines) if lines else ""


def difference_section(
    name: str, systems: dict[str, list[Run]], has_transfer: dict[str, bool]
) -> list[str]:
    """Write the paired differences of all systems with transfer to their baselines and controls."""
    from cmkt.evaluate.metrics import METRICS

    metrics, snrs = _metrics_of(systems), _snrs_of(systems)
    here = {system: has_transfer.get(system, False) for system in systems}
    pairs, rows, remarks = [], [], []
    for system in (system for system, transfer in here.items() if transfer):
        baseline = baseline_of(system, here)
        if baseline is None:
            remarks.append(f"{system} has no baseline among the scored systems.")
        others = [*([baseline] if baseline else []), *controls_of(system, here)]
        pairs += [(system, other) for other in others]
    for system, other in pairs:
        ours, theirs = systems[system], systems[other]
        common = [run for run in ours if run.seed in {run.seed for run in theirs}]
        if not common:
            remarks.append(f"{system} and {other} share no seed: not compared.")
            continue
        for snr in [None, *(snrs if len(snrs) > 1 else [])]:
            differences = [difference_of(ours, theirs, metric, snr) for metric in metrics]
            cells = [
                interval_cell(difference, METRICS[metric].decimals, sign=True)
                for difference, metric in zip(differences, metrics, strict=True)
            ]
            n = max((d.n_utterances for d in differences if d), default=0)
            label = "all" if snr is None else snr
            rows.append([f"{system} - {other}", label, *cells, str(n), seeds_cell(common)])
    if not rows and not remarks:
        return []
    sections = [f"### {name}: transfer minus baseline, and minus control"]
    if rows:
        header = [
            "difference",
            "input SNR (dB)",
            *(METRICS[m].label for m in metrics),
            "n",
            "seeds",
        ]
        sections += [
            "Paired by utterance and seed; 95 % bootstrap interval over utterances and seeds. "
            '"includes 0": no difference is shown. A gain over the baseline that the control (the '
            "same training with shuffled text or random vectors) shows as well is no gain by "
            "knowledge. Intervals from fewer than about five seeds are "
            "too narrow, those from one seed say nothing of other trainings.",
            markdown_table(header, rows),
        ]
    return sections + remarks


def training_section(
    expdir: Path, configs: dict[str, dict], plots: Path, output: Path
) -> list[str]:
    """Write the transfer diagnostics, training times and curves of all trainings."""
    from cmkt.evaluate.history import read_history
    from cmkt.evaluate.plots import training_curves

    tags = [tag for tag in configs if tag != NOISY]
    histories = {tag: read_history(expdir / tag) for tag in tags}
    known = {tag: history for tag, history in histories.items() if history}
    sections = ["## Training"]
    if known:
        curves = plots / "training_curves.png"
        training_curves(known, curves)
        sections += [
            "Validation values of the last epoch. `transfer_gap` = `cos_matched` - "
            "`cos_mismatched`, the cosine to the utterance's own text with its own acoustics minus "
            "that with another utterance's: only a gap above 0 shows that anything was "
            "transferred, and a gap alone is no gain in quality.",
            _history_table(known, LOSSES, lambda history: duration(history.seconds)),
            f"![Training curves]({_relative(curves, output)})",
        ]
        transfers = {tag: h for tag, h in known.items() if h.last("retrieval_top1") is not None}
        if transfers:
            sections += [
                "retrieval: share of tokens found, by what the acoustic side made of them, as the "
                "first or among the first five of the tokens of 100 validation utterances; "
                "mismatched: with another utterance's acoustics. entropy: 0 if a token is made of "
                "one frame, 1 if of all alike. monotonicity: share of tokens whose frames lie "
                "later than the token's before. gradient share: of the transfer at the tap.",
                _history_table(transfers, DIAGNOSTICS),
            ]
    missing = [tag for tag, history in histories.items() if not history]
    if missing:
        sections.append(f"No checkpoint.pth with a finished epoch: {', '.join(missing)}.")
    return sections if len(sections) > 1 else []


def _history_table(histories: dict, columns: dict[str, str], time=None) -> str:
    """Format the last validation values of some trainings.

    Args:
        histories: by experiment tag.
        columns: {name in the history: title}.
        time: formats a history's time, for a column of its own.
    """
    header = ["training", "epochs", *(["time"] if time else []), *columns.values()]
    rows = [
        [
            tag,
            str(history.epochs[-1]),
            *([time(history)] if time else []),
            *("-" if (v := history.last(name)) is None else f"{v:.4f}" for name in columns),
        ]
        for tag, history in histories.items()
    ]
    return markdown_table(header, rows)


def text_section(configs: dict[str, dict]) -> list[str]:
    """Write what text and which language model each training with transfer has learnt from.

    Args:
        configs: config.yaml by experiment tag; its `linguistic_meta` is the store's meta.yaml.
    """
    rows = []
    for tag, config in configs.items():
        meta, conf = config.get("linguistic_meta") or {}, config.get("transfer_conf") or {}
        if config.get("transfer") in (None, "none") or not meta:
            continue
        text = meta.get("text") or {}
        errors = [f"{k.upper()} {100 * text[k]['rate']:.1f} %" for k in ("wer", "cer") if k in text]
        targets = "standardised" if conf.get("standardise") else "raw"
        if conf.get("pca"):
            targets += f", {conf['pca']} principal components"
        rows.append([
            tag,
            f"{meta['model']}, layer {meta['layer']}, {meta.get('unit', 'token')}",
            targets,
            " ".join(filter(None, [text.get("source"), text.get("recogniser")])) or "-",
            str(meta["utterances"]),
            *(errors or ["-"]),
        ])  # fmt: skip
    if not rows:
        return []
    header = ["training", "language model", "targets", "text", "utterances", "errors"]
    return [
        "## Text learnt from",
        "utterances: of the training set, with text. errors: word or character error rate of the "
        "text against the transcripts, where it is known.",
        markdown_table(header, rows),
    ]


def _relative(path: Path, output: Path) -> str:
    return Path(os.path.relpath(path, output.parent)).as_posix()


def duration(seconds: float) -> str:
    """Format a time as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def attention_section(args: argparse.Namespace, configs: dict[str, dict], plots: Path) -> list[str]:
    """Draw attention maps of the first training of each system with transfer.

    Args:
        args: the options of the verb.
        configs: config.yaml by experiment tag.
        plots: folder for the images.
    """
    systems: dict[str, str] = {}
    for tag, config in configs.items():
        if config.get("transfer") not in (None, "none"):
            systems.setdefault(split_tag(tag)[0], tag)
    if not systems or args.llm_dir is None or args.attention_utterances < 1:
        return []
    features = Path(args.llm_dir) / args.valid_set / "linguistic.scp"
    sections = [
        "## Attention maps",
        f"Where the transcript tokens attend in the acoustic sequence ({args.valid_set}).",
    ]
    for tag in systems.values():
        data = configs[tag].get("valid_data_path_and_name_and_type") or []
        if features.resolve() not in {Path(entry[0]).resolve() for entry in data}:
            sections.append(f"{tag}: not drawn, it was not trained on {features}.")
            continue
        images = draw_attention(
            Path(args.expdir) / tag,
            read_table(Path(args.dumpdir) / "audio" / args.valid_set / "wav.scp"),
            features,
            args.attention_utterances,
            plots,
        )
        sections += [
            f"![{tag}, {utterance}]({_relative(path, Path(args.output))})"
            for utterance, path in images.items()
        ]
    return sections


def draw_attention(
    exp_dir: Path, audio: dict[str, str], features: Path, count: int, plots: Path
) -> dict[str, Path]:
    """Draw the attention of one model on the first utterances that have LLM features.

    Args:
        exp_dir: the training.
        audio: noisy audio file by utterance.
        features: linguistic.scp, with the file `tokens` beside it.
        count: how many utterances.
        plots: folder for the images.

    Returns:
        image by utterance.

    Raises:
        CmktError: none of the utterances has LLM features.
    """
    import kaldiio
    import torch

    from cmkt.corpus.audio import read_audio
    from cmkt.espnet_plugin.build import load_training_model
    from cmkt.espnet_plugin.tokens import number_tokens, read_vocabulary
    from cmkt.evaluate.plots import attention_map

    entries, tokens = read_table(features), read_table(features.with_name("tokens"))
    chosen = [utterance for utterance in audio if utterance in entries][:count]
    if not chosen:
        raise CmktError("no utterance of the validation set", features, remedy="run stage 3 again")
    model, vocabulary = load_training_model(exp_dir), read_vocabulary(exp_dir)
    images = {}
    for utterance in chosen:
        speech, fs = read_audio(audio[utterance])
        matrix = kaldiio.load_mat(entries[utterance])  # (T_t, D)
        with torch.no_grad():
            weights = model.attention(
                torch.from_numpy(speech)[None],  # (1, N)
                torch.tensor(matrix, dtype=torch.float32)[None],  # (1, T_t, D)
                torch.tensor([number_tokens(tokens[utterance], vocabulary)]),  # (1, T_t)
            )  # (T_t, T_a)
        images[utterance] = plots / f"attention_{exp_dir.name}_{utterance}.png"
        attention_map(
            weights.numpy(), tokens[utterance].split(), len(speech) / fs, images[utterance]
        )
    return images


def origin_section(command: str | None) -> list[str]:
    """Write what the results come from: command, versions, commit."""
    rows = [["python", platform.python_version()]]
    for package in PACKAGES:
        try:
            rows.append([package, metadata.version(package)])
        except metadata.PackageNotFoundError:
            rows.append([package, "not installed"])
    rows.append(["git commit", git_commit(Path.cwd())])
    sections = ["## Origin"]
    if command:
        sections.append(f"```\n{command}\n```")
    return [*sections, markdown_table(["software", "version"], rows)]


def git_commit(folder: Path) -> str:
    """Name the commit of a folder's git tree, and whether tracked files differ from it.

    Args:
        folder: anywhere inside the tree. A RESULTS.md in it may differ: the report writes it.
    """
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--"]
                + [":(top)", ":(top,exclude,glob)**/RESULTS.md"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "not in a git tree"
    return f"{commit} + local changes" if changes else commit


def plain_table(systems: dict[str, list[Run]]) -> str:
    """Format the main scores of one test set as aligned text, for the terminal."""
    from cmkt.evaluate.metrics import METRICS

    metrics = [metric for metric in _metrics_of(systems) if metric != "snr"]
    lines = [["system", "n", *(METRICS[metric].label for metric in metrics)]]
    for name, runs in systems.items():
        means = [mean_of(runs, metric) for metric in metrics]
        cells = [
            "-" if mean is None else f"{mean.mean:.{METRICS[metric].decimals}f}"
            for mean, metric in zip(means, metrics, strict=True)
        ]
        lines.append([name, str(len(runs[0].utterances)), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
