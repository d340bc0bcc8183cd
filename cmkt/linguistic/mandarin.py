"""Mandarin transcripts as they are spoken: Han characters, and Latin words among them."""

import re
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from cmkt.errors import CmktError
from cmkt.linguistic.characters import HAN, drop_punctuation, tidy, unify

HAN_SPACE = re.compile(f"(?<=[{HAN}]) +| +(?=[{HAN}])")
SYLLABLE = re.compile(r"((?<!\S)[a-zê]+[1-5](?!\S))")  # of Pinyin, by itself
UNREAD = re.compile(f"([{HAN}])5?")  # pypinyin gives the neutral tone to what it cannot read
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
# wetext escapes quotes and backslashes, so it never sees them.
NUMBER_CONTEXT = re.compile(r'(?=\S)[^"\\]*\d(?:[^"\\]*[^"\\\s])?')
LONG = re.compile(r"\d{16,}")  # read digit by digit
DIGITS = str.maketrans("0123456789", "零一二三四五六七八九")


def _import(package: str, option: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise CmktError(
            f"normaliser_conf: mandarin with {option} needs the package {error.name}",
            remedy="pip install 'cmkt[mandarin]'",
        ) from error


def _number_reader() -> Callable[[str], str]:
    """Return the function that writes a text's numbers as they are spoken."""
    normalizer = _import("wetext", "numbers: words").Normalizer(lang="zh", operator="tn")

    def read(text: str) -> str:
        if not any(map(str.isdecimal, text)):
            return text
        text = GROUPED.sub(lambda match: match[0].replace(",", ""), text)
        text = LONG.sub(lambda match: match[0].translate(DIGITS), text)
        text = re.sub(r"(?<=[A-Za-z])-(?=\d)", " ", text)  # GPT-4 is not minus four
        text = re.sub(r"(?<=%)[-~](?=\d)", "到", text)
        return NUMBER_CONTEXT.sub(lambda match: normalizer.normalize(match[0]), text)

    return read


def _script_converter(script: str) -> Callable[[str], str]:
    """Return the function that writes Han characters in one script."""
    opencc = _import("opencc", f"script: {script}")
    to_simplified = opencc.OpenCC("t2s").convert
    if script == "simplified":
        return to_simplified
    # What is traditional already would be converted again, 說明了 to 說明瞭.
    to_traditional = opencc.OpenCC("s2t").convert
    return lambda text: to_traditional(to_simplified(text))


def _pinyin_writer() -> Callable[[str], str]:
    """Return the function that writes Han characters as tone-numbered syllables."""
    pypinyin = _import("pypinyin", "pinyin: true")

    def write(text: str) -> str:
        syllables = pypinyin.lazy_pinyin(
            text, style=pypinyin.Style.TONE3, neutral_tone_with_five=True
        )
        return tidy(UNREAD.sub(r" \1 ", " ".join(syllables)))

    return write


def make_mandarin(
    case: str, punctuation: str, numbers: str, script: str, spaces: str, pinyin: bool
) -> Callable[[str], str]:
    """Return the normaliser `mandarin`; the options are those of `NORMALISERS`.

    Raises:
        CmktError: the package that an option needs is missing.
    """
    read_numbers = _number_reader() if numbers == "words" else None
    write_pinyin = _pinyin_writer() if pinyin else None
    convert_script = _script_converter(script) if script != "keep" else None

    def normalise(text: str) -> str:
        text = unify(text)
        if read_numbers and pinyin:
            # A tone is no number: Pinyin stays what it is.
            parts = SYLLABLE.split(text)
            parts[::2] = map(read_numbers, parts[::2])
            text = "".join(parts)
        elif read_numbers:
            text = read_numbers(text)
        if convert_script:
            text = convert_script(text)
        if case == "lower":
            text = text.lower()
        if punctuation == "drop":
            text = drop_punctuation(text, numbers)
        text = tidy(text)
        if spaces == "drop":
            text = HAN_SPACE.sub("", text)
        return write_pinyin(text) if write_pinyin else text

    return normalise
