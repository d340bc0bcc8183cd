"""Write a trained model as a plain ESPnet enhancement model, without its text side (stage 6).

The export holds config.yaml and model.pth, which stock ESPnet loads, meta.yaml and README.md. What
only training needs is left out: everything under `transfer.`, data paths, machine-specific keys.
Run again after scoring, it fills the scores into the README.md and leaves the rest alone.
"""

import json
import subprocess
from pathlib import Path

from cmkt import __version__
from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import OWN_CRITERIONS, OWN_SEPARATORS
from cmkt.espnet_plugin.rivals import without_rivals
from cmkt.settings import read_mapping
from cmkt.stage import Stage, atomic_file

TRANSFER_PREFIX = "transfer."
FEEDBACK_PREFIX = "cmkt_"  # of the separator of an export with a feedback adapter
DEFAULT_CHECKPOINTS = ("valid.loss_se.ave.pth", "valid.loss_se.best.pth")
# What the model is built from. The rest of a training's config.yaml is how and on what it was
# trained, with paths that exist on one machine.
PARTS = ("encoder", "separator", "decoder", "mask_module")
CONFIG_KEYS = (*PARTS, *(f"{part}_conf" for part in PARTS),
               "criterions", "model_conf", "num_spk", "version")  # fmt: skip
LLM_KEYS = ("model", "revision", "layer", "unit", "dimension")


def add_arguments(parser) -> None:
    """Add the options of `cmkt export`."""
    parser.add_argument("experiment", type=Path, metavar="EXP", help="training folder (stage 5)")
    parser.add_argument(
        "--output_dir", type=Path, help="folder to make (default: EXP/export)", metavar="DIR"
    )
    parser.add_argument(
        "--checkpoint",
        help="file in EXP (default: the average of the best epochs, valid.loss_se.ave.pth, "
        "or the best one, valid.loss_se.best.pth)",
    )


def run(args) -> None:
    """Run `cmkt export`."""
    output = args.output_dir or args.experiment / "export"
    config_file = args.experiment / "config.yaml"
    if not config_file.exists():
        raise CmktError("no training: no config.yaml", args.experiment, remedy="run stage 5")
    checkpoint = find_checkpoint(args.experiment, args.checkpoint)
    stage = Stage(output, [config_file, checkpoint], {"checkpoint": checkpoint.name})
    if stage.is_done():
        print(f"{output}: up to date")
    else:
        config = read_mapping(config_file)
        sample_rate = find_sample_rate(config)
        exported = exported_config(config, sample_rate)
        weights = exported_weights(exported, checkpoint)
        meta = describe(args.experiment, config, sample_rate, checkpoint, weights)
        output.parent.mkdir(parents=True, exist_ok=True)
        with stage.working_directory() as work:
            _write(work, exported, weights, meta)
    write_card(output, args.experiment)


def find_checkpoint(experiment: Path, name: str | None) -> Path:
    """Return the weights to export.

    Args:
        experiment: training folder.
        name: a file in it; None takes the first of `DEFAULT_CHECKPOINTS`.

    Raises:
        CmktError: there is none.
    """
    names = (name,) if name else DEFAULT_CHECKPOINTS
    for candidate in names:
        if (experiment / candidate).exists():
            return experiment / candidate
    raise CmktError(
        f"no weights: no {' or '.join(names)}",
        experiment,
        remedy="run stage 5 (cmkt train) to its end, or name a file in it with --checkpoint",
    )


def find_sample_rate(config: dict) -> int:
    """Return the sampling rate in Hz that a model was trained at.

    Args:
        config: config.yaml of the training. The header of its first training file counts, where
            that is still there: ESPnet's key `sample_rate` is 8000 unless someone sets it.
    """
    import soundfile

    from cmkt.corpus.datadir import read_table

    for path, name, _ in config.get("train_data_path_and_name_and_type") or []:
        if name == "speech_mix" and Path(path).exists():
            first = next(iter(read_table(path).values()), "")
            try:
                return soundfile.info(first).samplerate
            except (soundfile.LibsndfileError, RuntimeError):
                break  # moved, or a pipe
    return config.get("sample_rate") or 8000


def exported_config(config: dict, sample_rate: int) -> dict:
    """Keep of a training's configuration what stock ESPnet builds the model from.

    Args:
        config: config.yaml of the training.
        sample_rate: in Hz.
    """
    kept = {key: config[key] for key in CONFIG_KEYS if key in config}
    # Initialisation is overwritten by the weights; some of ESPnet's kinds come and go.
    kept |= {"init": None, "sample_rate": sample_rate}
    kept["criterions"] = [
        criterion
        for criterion in without_rivals(kept.get("criterions") or [])
        if criterion.get("name") not in OWN_CRITERIONS
    ]
    conf = config.get("transfer_conf") or {}
    if config.get("transfer") == "cmkt" and conf.get("feedback") is not None:
        # The one thing of ours that stays in the model. Stock ESPnet would load the rest and leave
        # it out without a word, so the separator gets a name that stock ESPnet refuses.
        kept["feedback"] = {"tap": conf.get("tap", "auto"), **conf["feedback"]}
        kept["separator"] = f"{FEEDBACK_PREFIX}{config['separator']}"
    return kept


def exported_weights(config: dict, checkpoint: Path) -> dict:
    """Read a checkpoint without the transfer's weights and check it against the model, strictly.

    Args:
        config: what `exported_config` returned.
        checkpoint: state dict of the trained model.

    Returns:
        {name: tensor}, unchanged, on the CPU.

    Raises:
        CmktError: not a state dict, or one with missing or unexpected weights.
    """
    from cmkt.enhance.loading import load_strictly, read_weights
    from cmkt.espnet_plugin.build import build_enhancement_model

    weights = {
        name: tensor
        for name, tensor in read_weights(checkpoint).items()
        if not name.startswith(TRANSFER_PREFIX)
    }
    load_strictly(build_enhancement_model(config), weights, checkpoint)
    return weights


def describe(
    experiment: Path, config: dict, sample_rate: int, checkpoint: Path, weights: dict
) -> dict:
    """Return the contents of meta.yaml: what the model is and where it comes from."""
    from importlib.metadata import version

    import torch

    sets = {}
    for mode in ("train", "valid"):
        for path, name, _ in config.get(f"{mode}_data_path_and_name_and_type") or []:
            if name == "speech_mix":
                sets[mode] = Path(path).parent.name
    trained_with = config.get("linguistic_meta") or {}
    llm = {key: trained_with[key] for key in LLM_KEYS if key in trained_with}
    if "text" in trained_with:
        llm["text_source"] = trained_with["text"]["source"]
    if "model" in llm and Path(str(llm["model"])).is_absolute():
        llm["model"] = Path(llm["model"]).name  # a local folder: its place is nobody's business
    return {
        "name": experiment.resolve().name,
        "sample_rate": sample_rate,
        "backbone": config.get("separator"),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "config": Path(str(config.get("config"))).name if config.get("config") else None,
        "checkpoint": checkpoint.resolve().name,
        "seed": config.get("seed"),
        "data": sets,
        "transfer": config.get("transfer", "none"),
        "transfer_conf": config.get("transfer_conf") or None,
        "llm": llm or None,
        "git_commit": _git_commit(experiment),
        "versions": {
            "cmkt": __version__,
            "espnet": version("espnet"),
            "torch": str(torch.__version__),
        },
    }


def _git_commit(folder: Path) -> str | None:
    """Return the commit of the repository that a folder lies in, if there is one."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def _write(work: Path, config: dict, weights: dict, meta: dict) -> None:
    import torch
    import yaml

    torch.save(weights, work / "model.pth")
    for name, content in (("config.yaml", config), ("meta.yaml", meta)):
        with atomic_file(work / name) as stream:
            yaml.safe_dump(content, stream, sort_keys=False, allow_unicode=True)


def write_card(export: Path, experiment: Path) -> None:
    """Write README.md of an export: what it is, how to use it, how well it does.

    Args:
        export: folder with meta.yaml.
        experiment: the training, whose `scores/<set>/summary.json` are quoted if they are there.
    """
    meta = read_mapping(export / "meta.yaml")
    llm = meta["llm"]
    llm_line = "none" if meta["transfer"] == "none" else "not recorded"
    if llm:
        llm_line = ", ".join(f"{key} {value}" for key, value in llm.items())
    data_line = ", ".join(f"{mode}: {name}" for mode, name in meta["data"].items())
    ours = meta["backbone"] in OWN_SEPARATORS
    facts = {
        "sampling rate": f"{meta['sample_rate']} Hz",
        "backbone": f"`{meta['backbone']}` (separator of {'cmkt' if ours else 'ESPnet'})",
        "parameters": f"{meta['parameters']:,}",
        "language model in training": llm_line,
        "data sets": data_line or "not recorded",
        "configuration": f"{meta['config'] or 'not recorded'}, seed {meta['seed']}",
        "weights": meta["checkpoint"],
        "git commit": meta["git_commit"] or "none",
        "versions": ", ".join(f"{key} {value}" for key, value in meta["versions"].items()),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    stock = f"""or with stock ESPnet, in Python:

    from espnet2.bin.enh_inference import SeparateSpeech
    enhance = SeparateSpeech("{export.name}/config.yaml", "{export.name}/model.pth")
    enhanced = enhance(noisy[None], fs={meta["sample_rate"]})[0][0]  # noisy: (samples,) float32"""
    if ours:
        stock = "Its separator is one of `cmkt`, which stock ESPnet does not know: it needs `cmkt`."
    if (meta["transfer_conf"] or {}).get("feedback") is not None:
        stock = "It holds a feedback adapter, which stock ESPnet does not know: it needs `cmkt`."
    card = f"""# {meta["name"]}

A speech enhancement model. It takes noisy speech and needs no text and no language model.

| | |
|---|---|
{rows}

## Use

    cmkt enhance {export.name} noisy.wav -o enhanced

{stock}

## Scores

{_score_table(experiment / "scores")}
"""
    path = export / "README.md"
    if not path.exists() or path.read_text(encoding="utf-8") != card:
        with atomic_file(path) as stream:
            stream.write(card)


def _score_table(scores: Path) -> str:
    summaries = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(scores.glob("*/summary.json"))
        if not path.parent.name.startswith(".")  # unfinished work of a stage
    }
    if not summaries:
        return "Not scored yet. After stage 8, `cmkt export` with the same arguments fills them in."
    metrics = list(dict.fromkeys(m for summary in summaries.values() for m in summary["metrics"]))
    lines = [
        f"| test set | n | {' | '.join(metrics)} |",
        "|---|---" + "|---" * len(metrics) + "|",
    ]
    for name, summary in summaries.items():
        means = [summary["metrics"].get(metric, {}).get("mean") for metric in metrics]
        cells = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        lines.append(f"| {name} | {summary['n_utterances']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nMeans over utterances; si_snr and snr in dB."
