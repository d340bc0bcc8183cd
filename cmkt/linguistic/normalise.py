"""Transcript normalisation before the language model's tokenizer.

A language-model YAML names the normaliser and its options:

    normaliser: mandarin
    normaliser_conf: {script: simplified, pinyin: true}
"""

from collections.abc import Callable

from cmkt.errors import CmktError

CASE = ("lower", "keep")
PUNCTUATION = ("drop", "keep")  # symbols and emoji count as punctuation
NUMBERS = ("words", "keep")

# Each normaliser's options and what they may be, the default first.
NORMALISERS: dict[str, dict[str, tuple]] = {
    "none": {},
    "lower": {},
    "english": {"case": CASE, "punctuation": PUNCTUATION, "numbers": NUMBERS},
    "mandarin": {
        "case": CASE,
        "punctuation": PUNCTUATION,
        "numbers": NUMBERS,
        "script": ("keep", "simplified", "traditional"),
        "spaces": ("drop", "keep"),  # those that touch a Han character
        "pinyin": (False, True),
    },
}


def check_normaliser(name: str, conf: dict) -> None:
    """Refuse an unknown normaliser or option.

    Args:
        name: one of `NORMALISERS`.
        conf: its options; those left out take their defaults.

    Raises:
        CmktError: what is wrong with `normaliser` or `normaliser_conf`.
    """
    if name not in NORMALISERS:
        raise CmktError(f"normaliser: {name!r} is not one of {', '.join(NORMALISERS)}")
    options = NORMALISERS[name]
    for key, value in conf.items():
        if key not in options:
            known = ", ".join(options) or "none"
            raise CmktError(
                f"normaliser_conf: {name} has no option {key!r}", remedy=f"has: {known}"
            )
        # `repr`, because 1 equals True and a list is not hashable.
        if repr(value) not in map(repr, options[key]):
            choices = ", ".join(str(choice) for choice in options[key])
            raise CmktError(f"normaliser_conf: {key}: {value!r} is not one of {choices}")


def make_normaliser(name: str, conf: dict) -> Callable[[str], str]:
    """Return the function that normalises one text.

    Normalising twice equals normalising once; a text without a word becomes `''`.

    Args:
        name: `none`; `lower`; `english`; `mandarin`, which reads Latin words in the text too.
        conf: its options, see `NORMALISERS`.

    Raises:
        CmktError: as `check_normaliser`, or a library that an option needs is missing.
    """
    check_normaliser(name, conf)
    options = {key: choices[0] for key, choices in NORMALISERS[name].items()} | conf
    if name == "english":
        from cmkt.linguistic.english import make_english

        return make_english(**options)
    if name == "mandarin":
        from cmkt.linguistic.mandarin import make_mandarin

        return make_mandarin(**options)
    return {"none": str, "lower": str.lower}[name]
