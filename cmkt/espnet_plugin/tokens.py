"""Which token each row of a linguistic store stands for, as numbers."""

from pathlib import Path

from cmkt.corpus.datadir import read_table, write_table

#: What a token gets that the training set does not have, and an utterance without a transcript.
UNKNOWN = 0
FOLDER = "token_ids"  # in an experiment


def find_vocabulary(store: str | Path) -> dict[str, int]:
    """Number the tokens of the training set's store from 1 on, in alphabetical order."""
    lines = read_table(Path(store) / "tokens").values()
    return {token: n for n, token in enumerate(sorted({t for s in lines for t in s.split(" ")}), 1)}


def number_tokens(line: str, vocabulary: dict[str, int]) -> list[int]:
    """Return the numbers of the tokens in a line of a store's table `tokens`."""
    return [vocabulary.get(token, UNKNOWN) for token in line.split(" ")]


def write_vocabulary(vocabulary: dict[str, int], folder: Path) -> None:
    """Write the numbers of the tokens to the file `vocabulary` of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "vocabulary", {token: str(n) for token, n in vocabulary.items()})


def read_vocabulary(experiment: Path) -> dict[str, int]:
    """Read what `write_vocabulary` has written in the folder `token_ids` of a training.

    Returns:
        the numbers of the tokens; empty for a training that was given its data without --llm_dir.
    """
    path = experiment / FOLDER / "vocabulary"
    table = read_table(path) if path.exists() else {}
    return {token: int(number) for token, number in table.items()}


def write_token_ids(
    store: str | Path, utterances: list[str], vocabulary: dict[str, int], path: Path
) -> None:
    """Write a table that ESPnet reads as `text_int`.

    Args:
        store: linguistic store of a set.
        utterances: of the set's mixtures; those without a transcript get one `UNKNOWN`, as their
            embeddings are one row of zeros.
        vocabulary: of the training set.
        path: file to write.
    """
    tokens = read_table(Path(store) / "tokens")
    numbers = {u: number_tokens(tokens[u], vocabulary) if u in tokens else [UNKNOWN]
               for u in utterances}  # fmt: skip
    write_table(path, {u: " ".join(map(str, ids)) for u, ids in numbers.items()})
