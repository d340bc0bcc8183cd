"""What the rows of an embedding stand for: tokens, words or characters."""

import re

import numpy as np

UNITS = {"word": re.compile(r"\S+"), "character": re.compile(r"\S")}


def unit_spans(text: str, unit: str) -> list[tuple[int, int]]:
    """Return where the units of a text begin and end.

    Args:
        text: normalised.
        unit: `word` (between white space) or `character` (each that is not white space).
    """
    return [match.span() for match in UNITS[unit].finditer(text)]


def pieces_of_units(
    pieces: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Match a tokenizer's pieces with the units that they overlap.

    A piece that spans several units belongs to each of them; a unit without a piece (a character
    that the tokenizer drops) is left out.

    Args:
        pieces: (P, 2) begin and end of each piece in the text; in order.
        units: (U, 2) the same of each unit; in order, without overlap.

    Returns:
        members: (M,) piece numbers, those of one unit after those of the other;
        starts: (V,) where in `members` each unit's pieces begin;
        kept: (V,) the numbers of the units that have a piece.
    """
    first = np.searchsorted(units[:, 1], pieces[:, 0], side="right")  # (P,)
    count = np.maximum(np.searchsorted(units[:, 0], pieces[:, 1]) - first, 0)  # (P,)
    members = np.repeat(np.arange(len(pieces)), count)
    within = np.arange(len(members)) - np.repeat(np.cumsum(count) - count, count)
    owners = np.repeat(first, count) + within
    order = np.argsort(owners, kind="stable")
    kept, starts = np.unique(owners[order], return_index=True)
    return members[order], starts, kept


def mean_of_members(vectors: np.ndarray, members: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Average the pieces of each unit.

    Args:
        vectors: (P, D) of the pieces.
        members: see `pieces_of_units`.
        starts: see `pieces_of_units`.

    Returns:
        (V, D)
    """
    sums = np.add.reduceat(vectors[members], starts, axis=0)
    return sums / np.diff(starts, append=len(members))[:, None].astype(vectors.dtype)
