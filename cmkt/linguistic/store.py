"""The linguistic store: one float32 matrix (T_t, D) per utterance, and what made it.

A store is a folder:
    linguistic.ark, linguistic.scp  matrices that kaldiio and omniio read
    tokens                          the token strings of each utterance
    text                            the transcripts the matrices were made from
    meta.yaml                       model, revision, layer, dimension, tokenizer, normaliser, ...
    skipped, truncated              utterances without a token, or too long; only if there are any
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import kaldiio
import numpy as np
import yaml

from cmkt.corpus.datadir import read_table, write_table
from cmkt.errors import CmktError
from cmkt.stage import atomic_file

ARK, SCP, META = "linguistic.ark", "linguistic.scp", "meta.yaml"
JOURNAL = ".batches.jsonl"

# Facts of one store that say nothing about which language model made it.
NOT_MODEL = {"utterances", "cmkt_version"}


def read_meta(folder: str | Path) -> dict:
    """Read what a store says of itself.

    Args:
        folder: the store.

    Returns:
        meta.yaml; `dimension` is D, the width of the embeddings.

    Raises:
        CmktError: not a linguistic store.
    """
    path = Path(folder) / META
    remedy = "make it with `cmkt embed` (stage 3)"
    if not path.is_file():
        raise CmktError("not a linguistic store: no such file", path, remedy=remedy)
    try:
        meta = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CmktError("not a linguistic store: not YAML", path, remedy=remedy) from error
    if not isinstance(meta, dict) or not isinstance(meta.get("dimension"), int):
        raise CmktError("not a linguistic store: names no dimension", path, remedy=remedy)
    return meta


def require_same_meta(folder_a: str | Path, folder_b: str | Path) -> None:
    """Refuse two stores of different language models, layers or normalisers.

    Args:
        folder_a: a store.
        folder_b: another one.

    Raises:
        CmktError: what differs; or one is not a store.
    """
    meta_a, meta_b = read_meta(folder_a), read_meta(folder_b)
    for key in sorted((meta_a.keys() | meta_b.keys()) - NOT_MODEL):
        if meta_a.get(key) != meta_b.get(key):
            raise CmktError(
                f"{key} is {meta_b.get(key)}, but {meta_a.get(key)} in {folder_a}",
                Path(folder_b) / META,
                remedy="make both stores with the same language model (stage 3)",
            )


class LinguisticStore(Mapping):
    """The matrices of a store, read when asked for.

    Args:
        folder: the store; may have been moved since it was made.

    Maps an utterance id to float32 (T_t, D): tokens, width of the language model.

    Raises:
        CmktError: not a linguistic store.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.offsets = {
            utterance: int(place.rpartition(":")[2])
            for utterance, place in read_table(self.folder / SCP).items()
        }

    def __getitem__(self, utterance: str) -> np.ndarray:
        return kaldiio.load_mat(f"{self.folder / ARK}:{self.offsets[utterance]}")

    def __len__(self) -> int:
        return len(self.offsets)

    def __iter__(self) -> Iterator[str]:
        return iter(self.offsets)


class StoreWriter:
    """Writes a store batch by batch; what a killed run wrote is kept.

    Args:
        work: folder to write in, perhaps with the batches of a killed run.

    A context manager; `finish` writes the tables. `tokens` holds {utterance: tokens} of all
    that is written so far.
    """

    def __init__(self, work: Path):
        self.work = work
        self.offsets: dict[str, int] = {}
        self.tokens: dict[str, list[str]] = {}
        self.dimension: int | None = None
        end = self._read_journal()
        self.ark = open(work / ARK, "r+b" if end else "wb")
        if end:
            self.ark.truncate(end)  # the batch that the run was killed in
            self.ark.seek(end)
        self.journal = open(work / JOURNAL, "a" if end else "w", encoding="utf-8")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.ark.close()
        self.journal.close()

    def _read_journal(self) -> int:
        """Take over the batches of a killed run; return where in the ark the last one ends."""
        path, end = self.work / JOURNAL, 0
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole:
            batch = json.loads(line)
            end, self.dimension = batch["end"], batch["dimension"]
            self.offsets |= batch["offsets"]
            self.tokens |= batch["tokens"]
        if len(whole) < len(lines):
            with atomic_file(path) as stream:
                stream.writelines(whole)
        return end

    def write(self, batch: dict[str, tuple[list[str], np.ndarray]]) -> None:
        """Add utterances.

        Args:
            batch: {utterance: (T_t token strings, matrix (T_t, D))}.
        """
        offsets = {}
        for utterance, (_, matrix) in batch.items():
            offsets[utterance] = self.ark.tell() + len(f"{utterance} ".encode())
            kaldiio.save_ark(self.ark, {utterance: np.ascontiguousarray(matrix, np.float32)})
            self.dimension = matrix.shape[1]
        self.ark.flush()  # before the journal vouches for it
        tokens = {utterance: strings for utterance, (strings, _) in batch.items()}
        record = {"end": self.ark.tell(), "dimension": self.dimension}
        self.journal.write(json.dumps({**record, "offsets": offsets, "tokens": tokens}) + "\n")
        self.journal.flush()
        self.offsets |= offsets
        self.tokens |= tokens

    def finish(self, final: Path, text: dict[str, str], meta: dict) -> None:
        """Write the tables.

        Args:
            final: folder that `work` will become; linguistic.scp refers to it.
            text: the transcripts.
            meta: what meta.yaml says besides the dimension and the number of utterances.
        """
        places = {utterance: f"{final / ARK}:{at}" for utterance, at in self.offsets.items()}
        write_table(self.work / SCP, places)
        write_table(self.work / "tokens", {u: " ".join(t) for u, t in self.tokens.items()})
        write_table(self.work / "text", text)
        meta = {**meta, "dimension": self.dimension, "utterances": len(self.offsets)}
        with atomic_file(self.work / META) as stream:
            yaml.safe_dump(meta, stream, sort_keys=False, allow_unicode=True)
        (self.work / JOURNAL).unlink()
