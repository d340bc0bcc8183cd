"""Batches by length: sizes that cannot work, and the lengths after cropping."""

from collections.abc import Sequence
from pathlib import Path

from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.stage import atomic_file

BY_BINS = ("numel", "length")  # ESPnet's batch types that count `batch_bins`


def read_lengths(shape_file: str | Path) -> dict[str, int]:
    """Read the first dimension of each utterance from a shape file, such as speech_mix_shape."""
    shapes = read_table(shape_file, lenient=True)
    return {utterance: int(shape.split(",")[0]) for utterance, shape in shapes.items()}


def check_batch_bins(
    mode: str, batch_bins: int, shape_files: Sequence[str], maximum: int | None = None
) -> None:
    """Refuse batches that the longest utterance alone would overfill.

    Args:
        mode: `train` or `valid`.
        batch_bins: elements of a batch, over all shape files.
        shape_files: lengths of the utterances; several are counted together.
        maximum: samples to which utterances are cropped; None for none.

    Raises:
        CmktError: names the utterance, its length, its line and the remedy.
    """
    if not shape_files:
        return
    tables = [read_lengths(path) for path in shape_files]
    tables[0] = {utterance: min(n, maximum or n) for utterance, n in tables[0].items()}
    totals = {u: sum(table.get(u, 0) for table in tables) for u in tables[0]}
    longest = max(totals, key=totals.__getitem__)
    if totals[longest] > batch_bins:
        option = "batch_bins" if mode == "train" else "valid_batch_bins"
        crop = ", or crop long utterances with --max_duration" if mode == "train" else ""
        raise CmktError(
            f"{option} {batch_bins} is less than the longest utterance, {longest}, of "
            f"{totals[longest]} samples",
            shape_files[0],
            1 + list(totals).index(longest),
            f"raise {option} to {totals[longest]} or more{crop}",
        )


def write_clipped(source: str | Path, target: str | Path, maximum: int) -> None:
    """Write a shape file whose first dimension is at most `maximum`."""
    with atomic_file(Path(target)) as stream:
        for utterance, shape in read_table(source, lenient=True).items():
            first, *rest = shape.split(",")
            stream.write(f"{utterance} {','.join([str(min(int(first), maximum)), *rest])}\n")
