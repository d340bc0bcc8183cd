"""Word times: the file `ctm` of a data directory, in the format of NIST and Kaldi.

A line is `<utterance> <channel> <start> <duration> <word>`, times in seconds from the start of the
utterance's audio; more columns, and lines that begin with `;;`, are passed over. The words of an
utterance follow each other in time, and their characters are those of its transcript.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from cmkt.errors import CmktError
from cmkt.stage import atomic_file

CTM = "ctm"


class Word(NamedTuple):
    """A word and when it is said.

    Args:
        text: the word.
        start: in seconds.
        end: in seconds.
    """

    text: str
    start: float
    end: float


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line and its first five columns."""
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip() and not line.startswith(";;"):
                    columns = line.split()[:5]
                    if len(columns) < 5:
                        raise CmktError(
                            f"{len(columns)} columns", path, number,
                            "each line is `<utterance> <channel> <start> <duration> <word>`",
                        )  # fmt: skip
                    yield number, columns
    except FileNotFoundError as error:
        raise CmktError("no such file", path) from error
    except UnicodeDecodeError as error:
        raise CmktError("not UTF-8 text", path, remedy="convert it with iconv") from error


def read_word_times(
    path: str | Path, utterances: Collection[str] | None = None
) -> dict[str, list[Word]]:
    """Read the word times of some utterances.

    Args:
        path: a CTM file.
        utterances: whose; None for all.

    Returns:
        {utterance: its words, in time order}; those without a line are absent.

    Raises:
        CmktError: a missing file, a line of another format, or times that run backwards; names
            the line.
    """
    path, words = Path(path), {}
    for number, (utterance, _, start, duration, text) in _lines(path):
        if utterances is not None and utterance not in utterances:
            continue
        try:
            begin, length = float(start), float(duration)
        except ValueError as error:
            raise CmktError(
                f"times {start} {duration} are no numbers", path, number, "want seconds"
            ) from error
        known = words.setdefault(utterance, [])
        # Not `<`, which is false of NaN.
        if not (begin >= 0 and length >= 0 and begin >= (known[-1].start if known else 0)):
            raise CmktError(
                f"the times of {utterance} run backwards", path, number, "sort the file by time"
            )
        known.append(Word(text, begin, begin + length))
    return words


def write_word_times(path: str | Path, words: dict[str, list[Word]]) -> None:
    """Write a CTM file, under its final name only when complete."""
    with atomic_file(Path(path)) as stream:
        for utterance in sorted(words):
            for text, start, end in words[utterance]:
                stream.write(f"{utterance} 1 {start:.3f} {end - start:.3f} {text}\n")


def copy_word_times(source: str | Path, target: str | Path, origins: dict[str, str]) -> None:
    """Write the word times of utterances that were made from others, of the same timing.

    Args:
        source: CTM file.
        target: CTM file to write.
        origins: {utterance: which utterance of `source` it was made from}.

    Raises:
        CmktError: as `read_word_times`.
    """
    words = read_word_times(source, set(origins.values()))
    write_word_times(target, {u: words[origin] for u, origin in origins.items() if origin in words})
