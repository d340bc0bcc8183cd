"""The speakers of each set and of its babble; no variant of espeak-ng is in two of them."""

import re
from dataclasses import replace

from espeak import Voice


def _voices(prefix: str, rows: list[tuple[str, int, int, int]]) -> list[Voice]:
    return [Voice(f"{prefix}{n:02d}", *row) for n, row in enumerate(rows, 1)]


# Accent and variant, words per minute, pitch, pitch range.
SPEAKERS = {
    "train": _voices(
        "train",
        [
            ("en-us", 160, 45, 50),
            ("en+m1", 150, 40, 60),
            ("en-gb-scotland+f1", 165, 60, 50),
            ("en-gb-x-rp+m3", 145, 58, 40),
            ("en-029+Annie", 155, 55, 60),
            ("en-gb-x-gbcwmd+m5", 170, 50, 50),
            ("en-gb-x-gbclan+m7", 150, 30, 45),
            ("en-us+linda", 160, 42, 55),
            ("en-us+adam", 175, 62, 35),
            ("en+aunty", 148, 50, 65),
            ("en-us+Mike", 158, 48, 40),
            ("en-gb-scotland+steph", 168, 56, 50),
            ("en-us-nyc+m8", 152, 38, 55),
            ("en-029+belinda", 162, 52, 45),
            ("en+klatt", 156, 55, 60),
            ("en-us+robert", 172, 35, 50),
        ],
    ),
    "valid": _voices(
        "valid",
        [
            ("en-gb-x-rp+grandma", 155, 55, 55),
            ("en-us+quincy", 165, 50, 45),
            ("en-gb-scotland+Andrea", 140, 44, 50),
            ("en-us-nyc+Gene", 158, 52, 60),
        ],
    ),
    "test": _voices(
        "test",
        [
            ("en-029+shelby", 154, 57, 60),
            ("en-us+m4", 160, 40, 50),
            ("en+paul", 166, 46, 45),
            ("en-gb-x-rp+anika", 140, 40, 50),
        ],
    ),
    "babble_train": _voices(
        "babble_train",
        [
            ("en-us+m6", 165, 40, 50),
            ("en+Andy", 158, 47, 50),
            ("en-029+david", 170, 37, 50),
            ("en-gb-x-rp+croak", 150, 44, 50),
            ("en-us+zac", 160, 45, 50),
            ("en-gb-scotland+Reed", 155, 52, 50),
            ("en-us-nyc+ed", 162, 48, 50),
            ("en+Lee", 168, 55, 50),
        ],
    ),
    "babble_test": _voices(
        "babble_test",
        [
            ("en-gb-scotland+boris", 160, 50, 50),
            ("en-us+Tweaky", 165, 60, 50),
            ("en-gb-x-gbcwmd+klatt2", 155, 42, 50),
            ("en-us-nyc+klatt4", 168, 39, 50),
            ("en+caleb", 158, 45, 50),
            ("en-gb-x-rp+Michael", 150, 58, 50),
        ],
    ),
}


def speakers(lang: str) -> dict[str, list[Voice]]:
    """Return the speakers of a language, by set.

    Mandarin has one accent only: the variants of the English speakers speak it, 1.2 times as
    fast, because at the same rate espeak-ng says a sentence more slowly.

    Args:
        lang: `en` or `zh`.
    """
    if lang == "en":
        return SPEAKERS
    return {
        name: [
            replace(voice, voice=re.sub("^[^+]+", "cmn", voice.voice), rate=voice.rate * 6 // 5)
            for voice in voices
        ]
        for name, voices in SPEAKERS.items()
    }
