"""Sentences of a language, dealt out to the sets.

Each language has a module, `sentences_<lang>.py`, that offers `WRITTEN` and `from_grammar`.
"""

import random
from itertools import islice

import sentences_en
import sentences_zh

GRAMMARS = {"en": sentences_en, "zh": sentences_zh}


def all_sentences(seed: int, lang: str) -> list[str]:
    """Return every sentence of a language, each once, shuffled.

    No two of the grammar share person, action and thing; the seed draws the rest of them.
    """
    generator = random.Random(seed)
    made = GRAMMARS[lang].WRITTEN + GRAMMARS[lang].from_grammar(generator)
    generator.shuffle(made)
    return made


def split_sentences(counts: dict[str, int], seed: int, lang: str = "en") -> dict[str, list[str]]:
    """Deal different sentences out to the sets.

    Args:
        counts: {set: number of sentences}; a count changes only the sets after it.
        seed: which sentences they are.
        lang: a key of `GRAMMARS`.

    Returns:
        {set: sentences}; no sentence is in two sets, or twice in one.

    Raises:
        ValueError: more sentences are asked for than there are.
    """
    sentences = all_sentences(seed, lang)
    if sum(counts.values()) > len(sentences):
        raise ValueError(f"there are {len(sentences)} sentences, not {sum(counts.values())}")
    rest = iter(sentences)
    return {name: list(islice(rest, count)) for name, count in counts.items()}
