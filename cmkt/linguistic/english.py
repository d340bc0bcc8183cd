"""English transcripts as they are spoken."""

import re
from collections.abc import Callable
from functools import cache

from cmkt.linguistic.characters import drop_punctuation, tidy, unify

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")  # fmt: skip
CURRENCIES = {  # symbol: one, several, hundredths
    "$": ("dollar", "dollars", "cents"),
    "£": ("pound", "pounds", "pence"),
    "€": ("euro", "euros", "cents"),
    "¥": ("yen", "yen", "sen"),
    "₹": ("rupee", "rupees", "paise"),
}
SCALES = "hundred|thousand|million|billion|trillion"
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)*)"
LONGEST = 15  # digits read as one number; num2words ends at 300


@cache
def _words(number: int, form: str = "cardinal") -> str:
    from num2words import num2words

    return num2words(number, to=form).replace("-", " ").replace(",", "")


def _digits(number: str) -> str:
    return " ".join(_words(int(digit)) for digit in number if digit.isdigit())


def _read_number(number: str, year: bool = True) -> str:
    """Read `1,234.5`, `1990` (as a year, if it may be one), `007` or a telephone number."""
    whole, *decimals = number.replace(",", "").split(".")
    grouped = "," in number
    by_digit = len(whole) >= 7 and not whole.endswith("000") or whole[0] == "0" and len(whole) > 1
    if len(whole) > LONGEST or (by_digit and not grouped):
        words = _digits(whole)
    elif year and not grouped and not decimals and 1100 <= int(whole) <= 2099:
        words = _words(int(whole), "year")
    else:
        words = _words(int(whole))
    return " point ".join([words, *map(_digits, decimals)])


def _read_date(match: re.Match) -> str:
    year, month, day = map(int, match.groups())
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return match[0]
    return f"{MONTHS[month - 1]} {_words(day, 'ordinal')} {_read_number(match[1])}"


def _read_time(match: re.Match) -> str:
    hour, minute = _words(int(match[1])), int(match[2])
    if minute == 0:
        return hour if match["half"] else f"{hour} o'clock"
    return f"{hour} {'oh ' if minute < 10 else ''}{_words(minute)}"


def _read_money(match: re.Match) -> str:
    one, several, hundredths = CURRENCIES[match["symbol"]]
    amount, scale = match["amount"], match["scale"]
    whole, _, decimals = amount.partition(".")
    if scale or len(decimals) not in (0, 2):
        return f"{_read_number(amount, year=False)}{' ' + scale if scale else ''} {several}"
    words = []
    if int(whole.replace(",", "")) or not int(decimals or 0):
        words.append(f"{_read_number(whole, year=False)} {one if whole == '1' else several}")
    if int(decimals or 0):
        words.append(f"{_words(int(decimals))} {hundredths}")
    return " and ".join(words)


def _read_fraction(match: re.Match) -> str:
    part, whole = int(match[1]), int(match[2])
    if not 0 < part < whole <= 10:
        return match[0]
    name = "half" if whole == 2 else _words(whole, "ordinal")
    return f"{_words(part)} {name}{'s' if part > 1 else ''}"


def _read_decade(match: re.Match) -> str:
    words = _read_number(match[1])
    return words[:-1] + "ies" if words.endswith("y") else words + "s"


# In this order: each takes its own from what the ones before it left.
READERS = [
    (re.compile(r"(?<![\w-])(\d{4})-(\d\d?)-(\d\d?)(?![\w-])"), _read_date),
    (
        re.compile(
            r"(?<![\w:.])([01]?\d|2[0-4]):([0-5]\d)(?![\d:])(?=(?P<half>\s?[ap]\.?m\b)?)",
            re.IGNORECASE,
        ),
        _read_time,
    ),
    (
        re.compile(r"(?<![\w-])(?:\(\d{3}\) ?|\d{3}-)?\d{3}-\d{4}(?![\w-])"),
        lambda match: _digits(match[0]),
    ),
    (re.compile(r"(?<=[\d%])[-–](?=[$£€¥₹]?\d)"), lambda match: " to "),
    (re.compile(r"(?<![^\s(])[-−](?=[$£€¥₹]?\d)"), lambda match: "minus "),
    (
        re.compile(
            rf"(?P<symbol>[$£€¥₹])\s?(?P<amount>{NUMBER})(?:\s(?P<scale>{SCALES})\b)?",
            re.IGNORECASE,
        ),
        _read_money,
    ),
    (re.compile(r"(?<![\w/.,])(\d{1,2})/(\d{1,2})(?![\w/])"), _read_fraction),
    (
        re.compile(rf"(\d{{1,{LONGEST}}}|\d{{1,3}}(?:,\d{{3}}){{1,4}})(?:st|nd|rd|th)\b", re.I),
        lambda match: _words(int(match[1].replace(",", "")), "ordinal"),
    ),
    (re.compile(r"(?<![\w.,])'?(\d{1,3}0)'?s\b", re.IGNORECASE), _read_decade),
    # GPT4, 5km, 5°C
    (re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=[\d%°])(?=[^\W\d_])"), lambda match: " "),
    (re.compile(r"(?<=\d)\s?%"), lambda match: " percent"),
    (re.compile(r"(?<=\d)\s?°"), lambda match: " degrees"),
    (re.compile(NUMBER), lambda match: _read_number(match[0])),
]


def read_numbers(text: str) -> str:
    """Write the numbers of a unified text as they are spoken."""
    for pattern, reader in READERS:
        text = pattern.sub(reader, text)
    return text


def make_english(case: str, punctuation: str, numbers: str) -> Callable[[str], str]:
    """Return the normaliser `english`; the options are those of `NORMALISERS`."""

    def normalise(text: str) -> str:
        text = unify(text)
        if numbers == "words" and any(map(str.isdecimal, text)):
            text = read_numbers(text)
        if case == "lower":
            text = text.lower()
        if punctuation == "drop":
            text = text.replace("&", " and ").replace("@", " at ")
            text = drop_punctuation(text, numbers)
        return tidy(text)

    return normalise
