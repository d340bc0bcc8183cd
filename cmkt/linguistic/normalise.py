"""Text normalisation before the tokenizer."""

from cmkt.errors import CmktError

NORMALISERS = {"none": lambda text: " ".join(text.split()), "lower": lambda text: " ".join(
    text.lower().split())}  # fmt: skip


def normalise(text: str, name: str) -> str:
    """Normalise one transcript.

    Args:
        text: the transcript.
        name: `none` (white space only) or `lower` (lower case as well; LibriSpeech is upper case).

    Raises:
        CmktError: an unknown name.
    """
    if name not in NORMALISERS:
        raise CmktError(
            f"normaliser {name!r} is unknown", remedy=f"known: {', '.join(NORMALISERS)}"
        )
    return NORMALISERS[name](text)
