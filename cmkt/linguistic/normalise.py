"""Transcript normalisation before the language model's tokenizer."""

from collections.abc import Callable

#: How a transcript may be changed. `lower` is for case-sensitive tokenizers and corpora such as
#: LibriSpeech, whose upper case they would spell out letter by letter.
NORMALISERS: dict[str, Callable[[str], str]] = {"none": str, "lower": str.lower}
