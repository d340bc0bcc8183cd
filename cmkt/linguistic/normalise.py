"""Transcript normalisation before the language model's tokenizer."""

from collections.abc import Callable

from cmkt.errors import CmktError

NORMALISERS: dict[str, Callable[[str], str]] = {"none": str, "lower": str.lower}


def check_normaliser(name: str, conf: dict) -> None:
    """Refuse an unknown normaliser or option."""
    if name not in NORMALISERS:
        raise CmktError(f"normaliser: {name!r} is not one of {', '.join(NORMALISERS)}")


def make_normaliser(name: str, conf: dict) -> Callable[[str], str]:
    """Return the function that normalises one text."""
    return NORMALISERS[name]
