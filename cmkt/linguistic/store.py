"""The linguistic store: one matrix (T_t, D) per utterance, and what made it.

A store is a folder:
    linguistic.<n>.ark, linguistic.scp  matrices that kaldiio and omniio read; utterances of the
                                        same text share one
    tokens           what each row of a matrix stands for
    text             the texts the matrices were made from
    meta.yaml        model, revision, layer, unit, dimension, tokenizer, source of the text, ...
    statistics.npz   mean (D,) and covariance (D, D) of all rows
    skipped, long    utterances without a token; with more than the model takes; if there are any
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import kaldiio
import numpy as np
import yaml

from cmkt.corpus.datadir import read_table, write_table
from cmkt.errors import CmktError
from cmkt.stage import atomic_file

SCP, META, STATISTICS = "linguistic.scp", "meta.yaml", "statistics.npz"

#: Kaldi's compression method of each `storage`: none, kTwoByteAuto, kOneByteAuto. Both scale a
#: whole matrix: the format with a header per column would need more than the few rows of a text.
COMPRESSION = {"float32": None, "16bit": 3, "8bit": 5}

# Facts of one store that say nothing about which language model made it.
NOT_MODEL = {"utterances", "rows", "arks", "cmkt_version", "text", "storage"}


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


def check_arks(folder: str | Path) -> None:
    """Compare the arks' sizes with those they were finished with.

    Raises:
        CmktError: one is missing, cut short or from elsewhere.
    """
    for name, size in read_meta(folder).get("arks", {}).items():
        path = Path(folder) / name
        found = path.stat().st_size if path.exists() else "no"
        if found != size:
            raise CmktError(
                f"corrupt store: {found} bytes, not {size}",
                path,
                remedy=f"remove {folder} and run stage 3 again",
            )


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
        CmktError: not a linguistic store, or a corrupt one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        check_arks(folder)
        self.places: dict[str, tuple[str, int]] = {}
        for utterance, place in read_table(self.folder / SCP).items():
            path, _, offset = place.rpartition(":")
            self.places[utterance] = (path.rpartition("/")[2], int(offset))

    def __getitem__(self, utterance: str) -> np.ndarray:
        name, offset = self.places[utterance]
        return read_matrix(f"{self.folder / name}:{offset}", utterance)

    def __contains__(self, utterance: object) -> bool:
        # Mapping would read the matrix.
        return utterance in self.places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def raw(self) -> Iterator[tuple[str, int, str, int]]:
        """Yield (ark, offset, key, end) of each matrix as it lies in its ark, in order."""
        # An ark holds what the scp refers to and nothing else, under the first of its utterances.
        keys: dict[tuple[str, int], str] = {}
        for utterance, place in self.places.items():
            keys.setdefault(place, utterance)
        ordered = sorted(keys)
        for place, following in zip(ordered, [*ordered[1:], ("", 0)], strict=True):
            if following[0] == place[0]:
                end = following[1] - len(f"{keys[following]} ".encode())
            else:
                end = self.meta["arks"][place[0]]
            yield *place, keys[place], end


def read_matrix(place: str, utterance: str) -> np.ndarray:
    """Read one matrix.

    Args:
        place: `file:offset`.
        utterance: whose it is, for the message.

    Raises:
        CmktError: not a Kaldi matrix there.
    """
    path, _, offset = place.rpartition(":")
    try:
        matrix = kaldiio.load_mat(place)
    # kaldiio has no exception of its own; RuntimeError: "not a digit".
    except (OSError, ValueError, EOFError, AssertionError, struct.error, MemoryError,
            RuntimeError) as error:  # fmt: skip
        raise CmktError(
            f"corrupt store: no matrix of utterance {utterance} at byte {offset}",
            path,
            remedy="remove the store and run stage 3 again",
        ) from error
    return np.asarray(matrix, np.float32)


class StoreWriter:
    """Writes one ark of a store batch by batch; what a killed run wrote is kept.

    Args:
        work: folder to write in, perhaps with the batches of a killed run.
        number: of the ark; each process writes one of its own.
        storage: a key of `COMPRESSION`.

    A context manager. Of all that is written so far, `entries` holds {key: (ark, offset, tokens)},
    the tokens in one string, and `notes` {key: remark}.
    """

    def __init__(self, work: Path, number: int, storage: str):
        self.name, self.compression = f"linguistic.{number}.ark", COMPRESSION[storage]
        self.path, self.journal_path = work / self.name, work / f".batches.{number}.jsonl"
        self.entries: dict[str, tuple[str, int, str]] = {}
        self.notes: dict[str, str] = {}
        end = self._read_journal()
        self.ark = open(self.path, "r+b" if end else "wb")
        if end:
            self.ark.truncate(end)  # the batch that the run was killed in
            self.ark.seek(end)
        self.journal = open(self.journal_path, "a" if end else "w", encoding="utf-8")

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.ark.close()
        self.journal.close()

    def _read_journal(self) -> int:
        """Take over the batches of a killed run; return where in the ark the last one ends."""
        path, end = self.journal_path, 0
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole:
            batch = json.loads(line)
            end = batch["end"]
            self.notes |= batch["notes"]
            for key, (offset, tokens) in batch["entries"].items():
                self.entries[key] = (self.name, offset, tokens)
        if len(whole) < len(lines):
            with atomic_file(path) as stream:
                stream.writelines(whole)
        return end

    def write(self, batch: dict[str, tuple[str, np.ndarray | bytes]], notes: dict) -> None:
        """Add matrices.

        Args:
            batch: {key: (T_t tokens in one string, matrix (T_t, D) or its bytes in another ark)}.
            notes: {key: remark}; may lack any.
        """
        entries = {}
        for key, (tokens, matrix) in batch.items():
            offset = self.ark.tell() + len(f"{key} ".encode())
            if isinstance(matrix, bytes):
                self.ark.write(f"{key} ".encode() + matrix)
            else:
                matrix = np.ascontiguousarray(matrix, np.float32)
                kaldiio.save_ark(self.ark, {key: matrix}, compression_method=self.compression)
            entries[key] = (offset, tokens)
        self.ark.flush()  # before the journal vouches for it
        record = {"end": self.ark.tell(), "entries": entries, "notes": notes}
        self.journal.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.journal.flush()
        self.entries |= {key: (self.name, *entry) for key, entry in entries.items()}
        self.notes |= notes


def read_written(work: Path) -> tuple[dict[str, tuple[str, int, str]], dict[str, str]]:
    """Return the `entries` and `notes` of all writers of a folder; none may be at work."""
    entries, notes = {}, {}
    for journal in sorted(work.glob(".batches.*.jsonl")):
        with StoreWriter(work, int(journal.name.split(".")[2]), "float32") as writer:
            entries |= writer.entries
            notes |= writer.notes
    return entries, notes


def moments_of(work: Path, entries: dict[str, tuple[str, int, str]]):
    """Return the `Moments` of matrices that are written; reading them also proves them readable."""
    from cmkt.linguistic.statistics import Moments

    moments = Moments()
    for key, (ark, offset, _) in sorted(entries.items(), key=lambda item: item[1][:2]):
        moments.add(read_matrix(f"{work}/{ark}:{offset}", key))
    return moments


def finish_store(
    work: Path, final: Path, keys: dict[str, str], text: dict[str, str], meta: dict
) -> dict:
    """Write the tables and the statistics of a store whose matrices are written.

    Args:
        work: the folder.
        final: folder that `work` will become; linguistic.scp refers to it.
        keys: {utterance: key of its matrix}.
        text: the texts of all utterances, also of those without a matrix.
        meta: what meta.yaml says besides the sizes.

    Returns:
        all that meta.yaml says.
    """
    entries, _ = read_written(work)
    moments = moments_of(work, entries)
    moments.save(work / STATISTICS)
    found = {utterance: entries[key] for utterance, key in keys.items()}
    write_table(work / SCP, {u: f"{final}/{name}:{at}" for u, (name, at, _) in found.items()})
    write_table(work / "tokens", {u: tokens for u, (_, _, tokens) in found.items()})
    write_table(work / "text", text)
    arks = {}
    for journal in sorted(work.glob(".batches.*.jsonl")):
        ark = work / f"linguistic.{journal.name.split('.')[2]}.ark"
        journal.unlink()
        if ark.stat().st_size:
            arks[ark.name] = ark.stat().st_size
        else:
            ark.unlink()
    meta = {
        **meta,
        "dimension": moments.dimension,
        "utterances": len(found),
        "rows": sum(tokens.count(" ") + 1 for _, _, tokens in found.values()),
        "arks": arks,
    }
    with atomic_file(work / META) as stream:
        yaml.safe_dump(meta, stream, sort_keys=False, allow_unicode=True)
    return meta
