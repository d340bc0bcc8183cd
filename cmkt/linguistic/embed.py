"""Turn transcripts into the token embeddings of a frozen language model.

Reads a Kaldi `text` and writes a linguistic store: linguistic.ark and linguistic.scp with one
float32 matrix (tokens, dimension) per utterance, special tokens left out; tokens (their
strings), text, and meta.yaml (model, revision, layer, dimension, tokenizer, normaliser).

An utterance whose transcript and language model are those of the store that is already in
--output_dir is taken from there. Utterances without a token are named in `skipped`, those
longer than the model can take in `truncated`.

--llm_config is a YAML with the keys model, revision, sha256 (of the weights), layer, normaliser
and batch_size; an option given here goes before it. `--model` sets the YAML's model aside
together with its revision and sha256.

--model is a local folder, a Hugging Face name, encoder or decoder, or package:<module> of an
installed package with weights. The network is used only for a name that is not in the cache.
"""

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from cmkt import __version__
from cmkt.corpus.datadir import read_table, write_table
from cmkt.errors import CmktError
from cmkt.linguistic.normalise import NORMALISERS
from cmkt.stage import MARKER, Stage


@dataclass
class LanguageModelConfig:
    """What a language-model YAML may say; see `cmkt embed --help`."""

    model: str | None = None
    revision: str | None = None
    sha256: str | None = None
    layer: int = -1
    normaliser: str = "none"
    batch_size: int = 32

    def check(self) -> None:
        """Refuse values that mean nothing."""
        if self.model is None:
            raise CmktError("no language model", remedy="give --llm_config or --model")
        if self.normaliser not in NORMALISERS:
            raise CmktError(
                f"no such normaliser: {self.normaliser}", remedy=f"one of {', '.join(NORMALISERS)}"
            )
        if self.batch_size < 1:
            raise CmktError(f"batch_size {self.batch_size}: want at least 1")


TYPES = {key.name: (int if key.type is int else str) for key in fields(LanguageModelConfig)}


def read_config(path: str | Path) -> LanguageModelConfig:
    """Read a language-model YAML.

    Args:
        path: for example `conf/llm/minilm.yaml`.

    Raises:
        CmktError: not YAML, an unknown key or a wrong type; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise CmktError("no such language-model configuration", path, remedy="see conf/llm/")
    try:
        source = path.read_text(encoding="utf-8")
        root, values = yaml.compose(source), yaml.safe_load(source)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise CmktError("not YAML", path, mark.line + 1 if mark else None) from error
    known = f"known keys: {', '.join(TYPES)}"
    if not isinstance(values, dict):
        raise CmktError("not a YAML mapping", path, remedy=known)
    for node, _ in root.value:
        line, key = node.start_mark.line + 1, node.value
        if key not in TYPES:
            raise CmktError(f"unknown key {key}", path, line, known)
        value, wanted = values[key], TYPES[key]
        optional = value is None and key in ("revision", "sha256")
        # `type`, because True is an int and a bare number no name.
        if not optional and type(value) is not wanted:
            name = {int: "a whole number", str: "text, in quotes if it looks like a number"}[wanted]
            raise CmktError(f"{key}: {value!r} is not {name}", path, line)
    config = LanguageModelConfig(**values)
    try:
        config.check()
    except CmktError as error:
        raise CmktError(str(error), path) from error
    return config


def add_arguments(parser) -> None:
    """Add the options of `cmkt embed`."""
    add = parser.add_argument
    add("--text", type=Path, required=True, help="Kaldi text: `<utterance> <transcript>` lines")
    add("--output_dir", type=Path, required=True, help="folder of the store")
    add("--llm_config", type=Path, help="language-model YAML, for example conf/llm/minilm.yaml")
    add("--model", help="folder, Hugging Face name or package:<module> (default: the YAML's)")
    add("--revision", help="branch, tag or commit on the hub (default: the YAML's, or main)")
    add("--layer", type=int, help="hidden layer; 0: input embeddings (default: the YAML's, or -1)")
    add("--normaliser", choices=list(NORMALISERS), help="default: the YAML's, or none")
    add("--batch_size", type=int, help="utterances at once (default: the YAML's, or 32)")
    add("--device", default="cpu", help="torch device, for example cuda (default: %(default)s)")


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
    for key in ("model", "revision", "layer", "normaliser", "batch_size"):
        if getattr(args, key) is not None:
            setattr(config, key, getattr(args, key))
    config.check()
    embed(args.text, args.output_dir, config, args.device)


def embed(
    text: str | Path, output_dir: str | Path, config: LanguageModelConfig, device: str = "cpu"
) -> None:
    """Make a linguistic store.

    Args:
        text: transcripts, a Kaldi table.
        output_dir: folder of the store.
        config: the language model and how it is used.
        device: a torch device.

    Raises:
        CmktError: bad input; nothing is changed in `output_dir`.
        OSError: for example no space left; nothing is changed in `output_dir`.
    """
    from cmkt.linguistic.embedder import Embedder, find_model
    from cmkt.linguistic.store import StoreWriter

    output_dir = Path(output_dir)
    transcripts = _read_text(Path(text))
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
        "layer": config.layer,
        "normaliser": config.normaliser,
        "weights_sha256": weights_sha256,
        "settings_sha256": model.settings_sha256(),
    }
    stage = Stage(output_dir, [text], {**identity, "output_dir": str(output_dir)})
    if stage.is_done():
        return
    old = _Reusable(output_dir, identity, transcripts)
    new = {u: t for u, t in transcripts.items() if u not in old.utterances}
    embedder = Embedder(model, config.layer, device) if new else None
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with stage.working_directory() as work:
        with StoreWriter(work) as writer:
            old.copy_to(writer, config.batch_size)
            skipped, truncated = {}, old.truncated
            if embedder:
                skipped, cut = _embed_new(new, embedder, config, writer)
                truncated = truncated | cut
            for what, table in (("skipped", skipped), ("truncated", truncated)):
                for utterance, why in sorted(table.items()):
                    logging.warning("%s %s: %s", what, utterance, why)
                if table:
                    write_table(work / what, table)
            if not writer.offsets:
                raise CmktError("no transcript has a token", text, remedy="check the transcripts")
            tokenizer = type(embedder.tokenizer).__name__ if embedder else old.tokenizer
            meta = {**identity, "tokenizer": tokenizer, "cmkt_version": __version__}
            writer.finish(output_dir, transcripts, meta)
    reused, total = len(old.utterances), len(writer.offsets)
    logging.info("%s: %d utterances, %d of them reused", output_dir, total, reused)


def _read_text(path: Path) -> dict[str, str]:
    if path.parent.is_dir() and (not path.exists() or path.stat().st_size == 0):
        raise CmktError(
            "this set has no transcripts",
            path,
            remedy="training without text is the baseline configuration, without `transfer: cmkt`",
        )
    return read_table(path)


class _Reusable:
    """What a finished store of the same language model holds for the same transcripts."""

    def __init__(self, folder: Path, identity: dict, transcripts: dict[str, str]):
        from cmkt.linguistic.store import LinguisticStore

        self.utterances: list[str] = []
        self.truncated: dict[str, str] = {}
        self.tokenizer: str | None = None
        if not (folder / MARKER).exists():
            return
        try:
            self.store = LinguisticStore(folder)
            text, self.tokens = read_table(folder / "text"), read_table(folder / "tokens")
        except CmktError:  # not a store, or an incomplete one: it is made anew
            return
        if any(self.store.meta.get(key) != value for key, value in identity.items()):
            return
        self.tokenizer = self.store.meta.get("tokenizer")
        self.utterances = [
            u for u in transcripts if u in self.store and text.get(u) == transcripts[u]
        ]
        if (folder / "truncated").exists():
            table = read_table(folder / "truncated")
            self.truncated = {u: table[u] for u in self.utterances if u in table}

    def copy_to(self, writer, batch_size: int) -> None:
        """Copy the entries that `writer` does not have yet."""
        left = [u for u in self.utterances if u not in writer.offsets]
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            writer.write({u: (self.tokens[u].split(), self.store[u]) for u in batch})


def _embed_new(texts: dict[str, str], embedder, config, writer) -> tuple[dict, dict]:
    """Embed the texts that `writer` does not have yet; return skipped and truncated ones."""
    from tqdm import tqdm

    normalise = NORMALISERS[config.normaliser]
    tokens = dict(
        zip(texts, embedder.tokenize([normalise(t) for t in texts.values()]), strict=True)
    )
    skipped = {u: "no tokens after normalisation" for u, t in tokens.items() if not t.strings}
    truncated = {
        u: f"truncated from {t.full_length} to {len(t.ids)} tokens, special ones included"
        for u, t in tokens.items()
        if t.full_length > len(t.ids)
    }
    # Similar lengths share a batch, so little is padded; the longest first, so that a batch too
    # large for the memory fails at once.
    queue = sorted((u for u in tokens if u not in skipped), key=lambda u: (-len(tokens[u].ids), u))
    with tqdm(total=len(queue), desc="embed", unit="utt", mininterval=0.5) as bar:
        for start in range(0, len(queue), config.batch_size):
            # Batches are cut from the whole queue, so a resumed run makes the same ones.
            batch = [u for u in queue[start : start + config.batch_size] if u not in writer.offsets]
            if batch:
                matrices = embedder.embed([tokens[u] for u in batch])
                strings = [tokens[u].strings for u in batch]
                writer.write(dict(zip(batch, zip(strings, matrices, strict=True), strict=True)))
            bar.update(len(queue[start : start + config.batch_size]))
    return skipped, truncated
