"""Word errors between texts; character errors where words are not separated by spaces."""

import re
import unicodedata

# Characters of languages that are written without spaces.
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def is_unspaced(texts) -> bool:
    """Tell whether most characters of texts are of a script without spaces between words."""
    text = "".join(texts)
    return 2 * len(UNSPACED.findall(text)) > len("".join(text.split()))


def count_errors(references: dict[str, str], hypotheses: dict[str, str]) -> tuple[str, dict]:
    """Compare transcripts, without regard to case and punctuation.

    Args:
        references: {utterance: text}.
        hypotheses: {utterance: text}; one that is missing counts as empty.

    Returns:
        `wer`, or `cer` if the references are written without spaces; and {utterance:
        (substitutions, deletions, insertions, words or characters of the reference)} of all
        references that hold a word.
    """
    import jiwer

    by_character = is_unspaced(references.values())

    def units(text: str) -> str:
        words = _words(text)
        return " ".join("".join(words) if by_character else words)

    errors = {}
    for utterance, reference in references.items():
        if not (wanted := units(reference)):
            continue
        found = jiwer.process_words(wanted, units(hypotheses.get(utterance, "")))
        counts = (found.substitutions, found.deletions, found.insertions)
        errors[utterance] = (*counts, len(wanted.split()))
    return "cer" if by_character else "wer", errors


def _words(text: str) -> list[str]:
    """Split a text into words in lower case; apostrophes within them are kept."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    kept = (" " if unicodedata.category(c)[0] in "PSC" and c != "'" else c for c in text)
    return [word for part in "".join(kept).split() if (word := part.strip("'"))]
