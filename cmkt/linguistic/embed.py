"""Turn transcripts into the token embeddings of a frozen language model.

Reads a Kaldi `text` and writes a linguistic store: linguistic.<n>.ark and linguistic.scp with one
matrix (tokens, dimension) per utterance, special tokens left out; tokens (what the rows stand
for), text, statistics.npz (mean and covariance of all rows) and meta.yaml.

Equal texts are computed once. Texts that the store in --output_dir already has, from the same
language model, are taken from there; an interrupted run goes on at its last batch. Utterances
without a token are named in `skipped`; `long` names those with more tokens than the model takes,
which are split (or truncated: `too_long` of the YAML).

--llm_config is a YAML such as conf/llm/minilm.yaml; an option given here goes before it. `--model`
sets the YAML's model aside together with its revision and sha256. It is a local folder, a
Hugging Face name (the network is used only for one that is not in the cache), or
package:<module> of an installed package with weights.

--text_source
  transcript   --text holds transcripts (default)
  asr          --text holds a recogniser's output from the clean speech (cmkt transcribe)
  asr_noisy    the same from the noisy speech
  partial:P    a share P of the transcripts, the other utterances count as without text
  corrupt:W    transcripts with wrong, missing and additional words at a word error rate W
  shuffled     the transcript of another utterance
  random       Gaussian vectors of the same mean and covariance, as many as there are tokens
"""

import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import yaml

from cmkt import __version__
from cmkt.corpus.datadir import read_table, write_table
from cmkt.errors import CmktError
from cmkt.linguistic.config import CHOICES, LanguageModelConfig, read_config
from cmkt.linguistic.models import LocalModel, find_model
from cmkt.linguistic.normalise import NORMALISERS, make_normaliser
from cmkt.linguistic.sources import TextSource
from cmkt.parallel import cluster_map, parallel_map
from cmkt.stage import MARKER, Stage

BLOCK = 4096  # texts tokenized at once, so that memory does not grow with the corpus
PART = 500  # texts that are worth the start of a process
UNKNOWN = 0.05  # share of the words that the tokenizer may not know without a warning
# Keys of the YAML that can be given on the command line too.
OPTIONS = ("model", "revision", "layer", "unit", "dtype", "storage", "normaliser", "batch_tokens")
NAMED = 10  # utterances in a warning
REUSED = "linguistic.0.ark"
REUSED_AT_ONCE = 256  # matrices copied with one entry in the journal


def add_arguments(parser) -> None:
    """Add the options of `cmkt embed`."""
    add = parser.add_argument
    add("--text", type=Path, required=True, help="Kaldi text: `<utterance> <transcript>` lines")
    add("--output_dir", type=Path, required=True, help="folder of the store")
    add("--llm_config", type=Path, help="language-model YAML, for example conf/llm/minilm.yaml")
    add("--model", help="folder, Hugging Face name or package:<module> (default: the YAML's)")
    add("--revision", help="branch, tag or commit on the hub (default: the YAML's, or main)")
    add("--layer", help="hidden layer by number, a:b for the mean of a range, or input (the static "
        "embeddings) (default: the YAML's, or -1: the last)")  # fmt: skip
    for key in ("unit", "dtype", "storage"):
        add(f"--{key}", choices=CHOICES[key], help="(default: the YAML's, or the first)")
    add("--normaliser", choices=list(NORMALISERS), help="without options (default: the YAML's)")
    add("--batch_tokens", type=int, help="tokens at once (default: the YAML's, or 2048)")
    add("--text_source", default="transcript", help="see above (default: %(default)s)")
    add("--seed", type=int, default=0, help="of partial, corrupt, shuffled, random (default: 0)")
    add("--device", default="cpu", help="torch device, for example cuda (default: %(default)s)")
    add("--nj", type=int, default=1, help="processes; on cuda, one GPU each (default: 1)")
    add("--cluster", type=Path, help="run the --nj parts by Dask, see conf/cluster/*.yaml")


def run(args) -> None:
    """Run `cmkt embed`.

    Args:
        args: the options of `add_arguments`.

    Raises:
        CmktError: bad input, before the language model is loaded.
    """
    config = read_config(args.llm_config) if args.llm_config else LanguageModelConfig()
    if args.model is not None:
        config.revision = config.sha256 = None
    if args.normaliser is not None:
        config.normaliser_conf = {}
    for key in OPTIONS:
        if getattr(args, key) is not None:
            setattr(config, key, getattr(args, key))
    if re.fullmatch(r"-?\d+", str(config.layer)):
        config.layer = int(config.layer)
    config.check()
    source = TextSource.parse(args.text_source)
    if source.kind == "none":
        raise CmktError("--text_source none needs no features", remedy="leave this stage out")
    if args.nj < 1:
        raise CmktError(f"--nj {args.nj}: want at least 1")
    embed(args.text, args.output_dir, config, source, args.seed, args.device, args.nj, args.cluster)


def embed(
    text: str | Path,
    output_dir: str | Path,
    config: LanguageModelConfig,
    source: TextSource = TextSource("transcript"),  # noqa: B008  frozen
    seed: int = 0,
    device: str = "cpu",
    nj: int = 1,
    cluster: Path | None = None,
) -> None:
    """Make a linguistic store.

    Args:
        text: transcripts, a Kaldi table.
        output_dir: folder of the store.
        config: the language model and how it is used.
        source: where the text comes from.
        seed: of the controls among the sources.
        device: a torch device.
        nj: number of processes or cluster tasks.
        cluster: a cluster YAML.

    Raises:
        CmktError: bad input; nothing is changed in `output_dir`.
        OSError: for example no space left; nothing is changed in `output_dir`.
    """
    from cmkt.linguistic.store import check_arks, finish_store, read_written

    output_dir, text = Path(output_dir), Path(text)
    transcripts = _read_text(text)
    model = find_model(config.model, config.revision)
    weights_sha256 = model.weights_sha256()
    if config.sha256 not in (None, weights_sha256):
        raise CmktError(
            f"weights of {config.model} have SHA-256 {weights_sha256}, not {config.sha256}",
            model.weights[0],
            remedy="get the model again, or correct sha256 in the configuration",
        )
    identity = {
        "model": config.model,
        "revision": model.revision,
        **config.features(),
        "weights_sha256": weights_sha256,
        "settings_sha256": model.settings_sha256(),
    }
    named = source.kind if source.amount is None else f"{source.kind}:{source.amount:g}"
    options = {**identity, "text_source": named, "seed": seed, "output_dir": str(output_dir)}
    inputs = [text, text.with_name("meta.yaml")]  # of `cmkt transcribe`
    stage = Stage(output_dir, inputs, options)
    if stage.is_done():
        check_arks(output_dir)
        return
    texts, facts = source.apply(transcripts, seed)
    normalise = make_normaliser(config.normaliser, config.normaliser_conf)
    normal = {utterance: normalise(text) for utterance, text in texts.items()}
    # Utterances of one text share the matrix of the first of them.
    owners: dict[str, str] = {}
    for utterance, line in normal.items():
        owners.setdefault(line, utterance)
    owners.pop("", None)
    with stage.working_directory() as work:
        # The Gaussian vectors of `random` take the place of real ones.
        real = work / "real" if source.kind == "random" else work
        real.mkdir(exist_ok=True)
        tokenizer = _reuse(output_dir, identity, owners, normalise, real)
        job = Job(real, 1, nj, model, config, device)
        tokenizer = _embed_parts(owners, real, job, cluster) or tokenizer
        written, notes = read_written(real)
        keys = {u: owners[line] for u, line in normal.items() if owners.get(line) in written}
        if not keys:
            raise CmktError("no transcript has a token", text, remedy="check the transcripts")
        if source.kind == "random":
            _randomise(real, work, written, seed, config.storage)
        skipped = {u: "no token after normalisation" for u in normal if u not in keys}
        long = {u: notes[key] for u, key in keys.items() if key in notes}
        for name, table in (("skipped", skipped), ("long", long)):
            for utterance, why in list(table.items())[:NAMED]:
                logging.warning("%s: %s: %s", name, utterance, why)
            if len(table) > NAMED:
                logging.warning("%s: %d in all, see %s", name, len(table), output_dir / name)
            if table:
                write_table(work / name, table)
        recorded = {"source": named, **facts, **_facts_of(text)}
        meta = {**identity, "tokenizer": tokenizer, "text": recorded, "cmkt_version": __version__}
        finish_store(work, output_dir, keys, texts, meta)
    different, reused = len(set(keys.values())), sum(e[0] == REUSED for e in written.values())
    logging.info("%s: %d utterances, %d different texts, %d of them reused",
                 output_dir, len(keys), different, reused)  # fmt: skip


def _read_text(path: Path) -> dict[str, str]:
    if path.parent.is_dir() and (not path.exists() or path.stat().st_size == 0):
        raise CmktError(
            "this set has no transcripts",
            path,
            remedy="--text_source asr lets a recogniser make them, none trains without text",
        )
    return read_table(path)


def _facts_of(text: Path) -> dict:
    """Return what `cmkt transcribe` says of the text that it made."""
    meta = text.with_name("meta.yaml")
    return yaml.safe_load(meta.read_text(encoding="utf-8")) if meta.exists() else {}


def _reuse(folder: Path, identity: dict, owners: dict, normalise, work: Path) -> str | None:
    """Copy the matrices that a finished store of the same language model has.

    Args:
        folder: perhaps such a store.
        identity: of the language model.
        owners: {normalised text: key} of the wanted ones.
        normalise: as for `owners`.
        work: where the copies go.

    Returns:
        the name of the tokenizer; None if the store is not of this language model.
    """
    from cmkt.linguistic.store import LinguisticStore, StoreWriter

    if not (folder / MARKER).exists():
        return None
    try:
        store = LinguisticStore(folder)
        text, tokens = read_table(folder / "text"), read_table(folder / "tokens")
        notes = read_table(folder / "long") if (folder / "long").exists() else {}
    except CmktError as error:  # it is made anew
        logging.warning("%s is not reused: %s", folder, error)
        return None
    if any(store.meta.get(key) != value for key, value in identity.items()):
        return None
    if store.meta["text"]["source"] == "random":  # no vectors of a language model
        return None
    with StoreWriter(work, 0, identity["storage"]) as writer:
        for ark, places in groupby(store.raw(), key=lambda place: place[0]):
            with open(folder / ark, "rb") as stream:
                while batch := list(islice(places, REUSED_AT_ONCE)):
                    copies, kept = {}, {}
                    for _, offset, old, end in batch:
                        key = owners.get(normalise(text[old]))
                        if key is None or key in writer.entries:
                            continue
                        stream.seek(offset)
                        copies[key] = (tokens[old], stream.read(end - offset))
                        if old in notes:
                            kept[key] = notes[old]
                    writer.write(copies, kept)
    return store.meta["tokenizer"]


@dataclass(frozen=True)
class Job:
    """One part of the work, for one process.

    Args:
        work: folder that holds the texts (`.todo.<of>`) and gets the matrices.
        number: of the part, from 1.
        of: number of parts.
        model: the language model.
        config: how it is used.
        device: a torch device.
        threads: of torch; None leaves it alone.
    """

    work: Path
    number: int
    of: int
    model: LocalModel
    config: LanguageModelConfig
    device: str
    threads: int | None = None


def _embed_parts(owners: dict[str, str], work: Path, job: Job, cluster: Path | None) -> str | None:
    """Embed what is not written yet, in `job.of` parts; return the name of the tokenizer."""
    from cmkt.linguistic.store import read_written

    job = replace(job, of=max(min(job.of, len(owners) // PART), 1))
    todo = work / f".todo.{job.of}"
    if not todo.exists():  # else parts are dealt as in the run that was killed
        for other in work.glob(".todo.*"):
            other.unlink()
        written, _ = read_written(work)
        write_table(todo, {key: line for line, key in owners.items() if key not in written})
    tokenizer = None
    if todo.stat().st_size:
        jobs = [replace(job, number=number) for number in range(1, job.of + 1)]
        if cluster:
            tokenizers = cluster_map(embed_part, jobs, cluster, "parts")
        elif job.of > 1:
            threads = max((os.cpu_count() or 1) // job.of, 1)
            jobs = [replace(job, threads=threads) for job in jobs]
            tokenizers = parallel_map(embed_part, jobs, job.of, "parts", spawn=True)
        else:
            tokenizers = map(embed_part, jobs)
        tokenizer = list(tokenizers)[0]
    todo.unlink()
    return tokenizer


def embed_part(job: Job) -> str:
    """Embed one part of the texts; return the name of the tokenizer."""
    import torch
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from cmkt.linguistic.embedder import Embedder
    from cmkt.linguistic.store import StoreWriter

    if job.threads:
        torch.set_num_threads(job.threads)
    device = job.device
    if device == "cuda" and job.of > 1:
        device = f"cuda:{(job.number - 1) % max(torch.cuda.device_count(), 1)}"
    embedder = Embedder(job.model, job.config, device)
    texts = list(read_table(job.work / f".todo.{job.of}").items())
    size = min(BLOCK, -(-len(texts) // job.of))
    starts = range(size * (job.number - 1), len(texts), size * job.of)
    total = sum(min(size, len(texts) - start) for start in starts)
    label = "embed" if job.of == 1 else f"embed {job.number}/{job.of}"
    with (
        StoreWriter(job.work, job.number, job.config.storage) as writer,
        tqdm(total=total, desc=label, unit="utt", mininterval=0.5) as bar,
        logging_redirect_tqdm(),  # a warning on a line of its own
    ):
        for start in starts:
            block = dict(texts[start : start + size])
            if not block.keys() <= writer.entries.keys():
                prepared = dict(zip(block, embedder.prepare(list(block.values())), strict=True))
                if start == 0:
                    _warn_of_unknown(list(prepared.values()))
                for batch in _batches(prepared, job.config.batch_tokens):
                    # Batches are cut from the whole block, so a resumed run makes the same ones.
                    batch = {key: one for key, one in batch.items() if key not in writer.entries}
                    if batch:
                        matrices = embedder.embed(list(batch.values()))
                        rows = zip(batch.items(), matrices, strict=True)
                        notes = {key: one.note for key, one in batch.items() if one.note}
                        writer.write({k: (" ".join(p.strings), m) for (k, p), m in rows}, notes)
            bar.update(len(block))
    return type(embedder.tokenizer).__name__


def _batches(prepared: dict, batch_tokens: int) -> Iterator[dict]:
    """Cut texts with tokens into batches of similar lengths, so that little is padded.

    The longest come first, so that a batch too large for the memory fails at once.
    """
    queue = [(max(map(len, p.windows)), key) for key, p in prepared.items() if p.strings]
    batch, longest, windows = {}, 0, 0
    for length, key in sorted(queue, key=lambda item: (-item[0], item[1])):
        longest, windows = max(longest, length), windows + len(prepared[key].windows)
        if batch and longest * windows > batch_tokens:
            yield batch
            batch, longest, windows = {}, length, len(prepared[key].windows)
        batch[key] = prepared[key]
    if batch:
        yield batch


def _warn_of_unknown(prepared: list) -> None:
    unknown = [string for one in prepared for string in one.unknown]
    total = sum(len(one.strings) for one in prepared)
    if total and len(unknown) > UNKNOWN * total:
        common = [string for string, _ in Counter(unknown).most_common(5)]
        logging.warning(
            "the tokenizer does not know %d of the first %d tokens, for example %s: "
            "is this language model of another language?",
            len(unknown), total, " ".join(common),
        )  # fmt: skip


def _randomise(real: Path, work: Path, written: dict, seed: int, storage: str) -> None:
    """Write Gaussian vectors of the statistics of the real ones, as many of them."""
    from cmkt.linguistic.statistics import Gaussian
    from cmkt.linguistic.store import StoreWriter, moments_of

    gaussian = Gaussian(*moments_of(real, written).mean_and_covariance())
    with StoreWriter(work, 1, storage) as writer:
        for key, (_, _, tokens) in written.items():
            if key not in writer.entries:
                generator = np.random.default_rng([seed, *key.encode()])
                drawn = gaussian.draw(tokens.count(" ") + 1, generator)
                writer.write({key: (tokens, drawn)}, {})
    shutil.rmtree(real)
