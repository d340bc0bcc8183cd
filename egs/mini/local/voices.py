"""The speakers of each set; no voice and variant is in two sets."""

from espeak import Voice


def _voices(prefix: str, rows: list[tuple[str, int, int, int]]) -> list[Voice]:
    return [Voice(f"{prefix}{n:02d}", *row) for n, row in enumerate(rows, 1)]


SPEAKERS = {
    "train": _voices("train", [
        ("en-us", 160, 45, 50),
        ("en+m1", 150, 40, 60),
        ("en-gb-scotland+f1", 165, 60, 50),
        ("en-gb-x-rp+m3", 145, 35, 40),
        ("en-029+f4", 155, 65, 60),
        ("en-gb-x-gbcwmd+m5", 170, 50, 50),
        ("en-gb-x-gbclan+m7", 150, 30, 45),
        ("en-us+Annie", 160, 70, 55),
        ("en-us+adam", 175, 42, 35),
        ("en+linda", 148, 58, 65),
        ("en-us+Mike", 158, 48, 40),
        ("en-gb-scotland+steph", 168, 66, 50),
        ("en-us-nyc+m8", 152, 38, 55),
        ("en-029+belinda", 162, 62, 45),
    ]),
    "valid": _voices("valid", [
        ("en-gb-x-rp+f1", 155, 55, 55),
        ("en-us+m2", 165, 36, 45),
        ("en-gb-scotland+zac", 150, 44, 50),
        ("en-us+Gene", 158, 52, 60),
    ]),
    "test": _voices("test", [
        ("en-gb-x-gbclan+f4", 158, 68, 50),
        ("en-us+m4", 150, 34, 50),
        ("en+paul", 166, 46, 45),
        ("en-029+shelby", 154, 57, 60),
    ]),
    "babble_train": _voices("babble", [
        ("en-us+m6", 165, 40, 50),
        ("en+Andy", 158, 47, 50),
        ("en-029+david", 170, 37, 50),
        ("en-gb-x-rp+croak", 150, 44, 50),
    ]),
    "babble_test": _voices("babbletest", [
        ("en-gb-scotland+Storm", 160, 50, 50),
        ("en-us+Tweaky", 165, 60, 50),
        ("en-gb-x-gbcwmd+klatt2", 155, 42, 50),
        ("en-us-nyc+klatt4", 168, 39, 50),
    ]),
}  # fmt: skip
