"""Measure on any set what a training with transfer has learnt of the text.

Printed, and written to EXP/diagnostics/<set>.json, is what training logs on its validation set:
`loss_se`, `loss_cma`, `cos_matched`, `cos_mismatched` and `transfer_gap`; `retrieval_top1` and
`retrieval_top5`, the shares of tokens found among those of 100 utterances (`_mismatched`: from the
acoustics of another utterance); `alignment_entropy` and `alignment_monotonicity`;
`gradient_share`, the transfer's share of the two losses' gradient norms at the tap (of a schedule:
with the weights that it starts with). docs/method.md says what they mean.

Run it in the recipe's folder. The set needs mixtures (stage 2) and LLM features of the same
language model (stage 3):

    cmkt embed --llm_config conf/llm/minilm.yaml --text dump/audio/test/text \\
        --output_dir dump/llm/minilm/test
    cmkt diagnose exp/blstm_cmkt_minilm_seed0 test
"""

import io
import json
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.settings import read_mapping
from cmkt.stage import atomic_file

SCHEDULED = ("loss", "weight_cma")  # of one time of the training, not of the model


def add_arguments(parser) -> None:
    """Add the options of `cmkt diagnose`."""
    parser.add_argument("experiment", type=Path, metavar="EXP", help="training folder (stage 5)")
    parser.add_argument("set", metavar="SET", help="name of a set, for example valid")
    parser.add_argument(
        "--dumpdir", type=Path, default="dump", help="mixtures, in audio/SET (default: dump)"
    )
    parser.add_argument(
        "--llm_dir", type=Path, help="LLM features, in SET (default: those of the training)"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")


def run(args) -> None:
    """Run `cmkt diagnose`."""
    config_file = args.experiment / "config.yaml"
    config = read_mapping(config_file, "training", "run stage 5")
    if config.get("transfer") != "cmkt":
        raise CmktError("trained without transfer: nothing to diagnose", config_file)
    mixtures = args.dumpdir / "audio" / args.set
    store = _store_of(config, args.llm_dir) / args.set
    for folder, remedy in ((mixtures, "run stage 2"), (store, "make it with `cmkt embed`")):
        if not folder.is_dir():
            raise CmktError("no such folder", folder, remedy=remedy)
    if args.batch_size < 2:
        raise CmktError("--batch_size must be at least 2: utterances are compared")
    values = diagnose(args.experiment, config, mixtures, store, args.batch_size, args.device)
    output = args.experiment / "diagnostics" / f"{args.set}.json"
    output.parent.mkdir(exist_ok=True)
    with atomic_file(output) as stream:
        json.dump(values, stream, indent=2)
    for name, value in values.items():
        print(f"{name:<28}{value:.4f}" if isinstance(value, float) else f"{name:<28}{value}")
    print(f"written to {output}")


def _store_of(config: dict, llm_dir: Path | None) -> Path:
    """Return the folder with the stores of all sets, and see that it is of the same model."""
    from cmkt.linguistic.store import require_same_meta

    data = {name: path for path, name, _ in config["train_data_path_and_name_and_type"]}
    trained_on = Path(data["linguistic"]).parent
    if llm_dir is None:
        return trained_on.parent
    if trained_on.is_dir():
        require_same_meta(trained_on, llm_dir / trained_on.name)
    return llm_dir


def diagnose(
    experiment: Path, config: dict, mixtures: Path, store: Path, batch_size: int, device: str
) -> dict[str, float | int]:
    """Measure a trained model on the utterances of a set that have LLM features.

    Args:
        experiment: training folder.
        config: its config.yaml.
        mixtures: mixture directory.
        store: linguistic store of the same utterances.
        batch_size: utterances at once; the acoustics of another one are taken from the same batch.
        device: of torch.

    Returns:
        {name: mean over the batches, weighted by their sizes}, after `utterances`.

    Raises:
        CmktError: no model, or fewer than two utterances with LLM features.
    """
    import torch
    from tqdm import tqdm

    from cmkt.espnet_plugin.tokens import read_vocabulary, write_token_ids

    speech, clean = (read_table(mixtures / name) for name in ("wav.scp", "spk1.scp"))
    utterances = [
        utterance for utterance in read_table(store / "linguistic.scp") if utterance in speech
    ]
    if len(utterances) < 2:
        raise CmktError("fewer than two utterances with LLM features", store)
    ids_file = experiment / "diagnostics" / f"{store.name}.token_ids"
    ids_file.parent.mkdir(exist_ok=True)
    write_token_ids(store, utterances, read_vocabulary(experiment), ids_file)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        from cmkt.espnet_plugin.data import OptionalArk, read_candidates
        from cmkt.espnet_plugin.task import load_trained_model

    model = load_trained_model(experiment, Namespace(**config)).to(device)
    model.transfer.set_candidates(*read_candidates(store / "linguistic.scp", ids_file))
    model.to(device)
    ids, texts = read_table(ids_file), OptionalArk(str(store / "linguistic.scp"))
    totals: dict[str, list[tuple[float, int]]] = {}
    batches = make_batches(utterances, speech, batch_size)
    for chosen in tqdm(batches, desc=f"diagnose {experiment.name} {store.name}", unit="batch"):
        batch = make_batch(chosen, speech, clean, texts, ids)
        model.compare_gradients()
        with torch.no_grad():
            _, stats, _ = model(**{name: value.to(device) for name, value in batch.items()})
        for name, value in stats.items():
            if name not in SCHEDULED and torch.isfinite(torch.as_tensor(value)).all():
                totals.setdefault(name, []).append((float(value), len(chosen)))
    ids_file.unlink()
    means = {n: sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
             for n, pairs in totals.items()}  # fmt: skip
    return {"utterances": len(utterances), **means}


def make_batches(utterances: list[str], speech: dict[str, str], size: int) -> list[list[str]]:
    """Cut a set into batches of similar lengths, the longest utterance of each first."""
    import soundfile

    ordered = sorted(utterances, key=lambda u: -soundfile.info(speech[u]).frames)
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:  # one utterance has no other to compare with
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def make_batch(
    chosen: list[str],
    speech: dict[str, str],
    clean: dict[str, str],
    texts,
    ids: dict[str, str],
) -> dict:
    """Read a batch and collate it with ESPnet, as in training; arguments as in `diagnose`."""
    import numpy as np
    from espnet2.train.collate_fn import common_collate_fn

    from cmkt.corpus.audio import read_audio

    data = [
        (
            utterance,
            {
                "speech_mix": read_audio(speech[utterance])[0],
                "speech_ref1": read_audio(clean[utterance])[0],
                "linguistic": texts[utterance],
                "token_ids": np.array(ids[utterance].split(), dtype=np.int64),
            },
        )
        for utterance in chosen
    ]
    return common_collate_fn(data)[1]
