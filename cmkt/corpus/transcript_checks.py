"""Checks of the transcripts of a data directory."""

import re

import numpy as np

from cmkt.corpus.checks import Findings
from cmkt.corpus.table_checks import Table

SCRIPTS = {
    "en": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"),
}
LETTER = re.compile(r"[^\W\d_]")
DIGIT = re.compile(r"\d")
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\ufeff\ufffd]")
#: Characters per second that nobody speaks.
LIMITS = {"en": (0.5, 40.0), "zh": (0.3, 15.0)}
DEVIATIONS = 6.0  # robust standard deviations of the logarithm
LEAST_DEVIATION = 0.1  # of the logarithm: very even speech is no reason for findings
ENOUGH = 20  # utterances, for a distribution


def guess_language(texts: list[str]) -> str:
    """Return `zh` or `en`, whichever script more transcripts have; empty without either."""
    counts = {lang: sum(1 for t in texts if s.search(t)) for lang, s in SCRIPTS.items()}
    # Mandarin transcripts may hold Latin words, English ones no Han characters.
    best = "zh" if counts["zh"] >= counts["en"] - counts["zh"] else "en"
    return best if counts[best] else ""


def check_transcripts(
    text: Table, seconds: dict[str, float], lang: str, findings: Findings
) -> None:
    """Check script, characters and speaking rate.

    Args:
        text: the table `text`.
        seconds: duration by utterance, of readable audio.
        lang: `en` or `zh`; empty checks no script.
        findings: gets what is wrong.
    """
    for key, line in text.values.items():
        if lang and not SCRIPTS[lang].search(line) and LETTER.search(line):
            findings.add("wrong_script", text.path, text.line(key), line[:60], key)
        if DIGIT.search(line):
            findings.add("digits", text.path, text.line(key), line[:60], key)
        if CONTROL.search(line):
            findings.add("control_characters", text.path, text.line(key), repr(line[:60]), key)
    _check_rates(text, seconds, LIMITS.get(lang, (0.3, 40.0)), findings)


def _check_rates(
    text: Table, seconds: dict[str, float], limits: tuple[float, float], findings: Findings
) -> None:
    keys = [key for key in text.values if seconds.get(key)]
    if not keys:
        return
    rates = np.array([len("".join(text.values[key].split())) / seconds[key] for key in keys])
    wrong = (rates < limits[0]) | (rates > limits[1])
    median = float(np.median(rates))
    if len(rates) >= ENOUGH:
        logarithms = np.log(rates / median)
        spread = 1.4826 * float(np.median(np.abs(logarithms)))
        wrong |= np.abs(logarithms) > DEVIATIONS * max(spread, LEAST_DEVIATION)
    for index in np.flatnonzero(wrong):
        detail = f"{rates[index]:.1f} characters per second, the median is {median:.1f}"
        findings.add("speaking_rate", text.path, text.line(keys[index]), detail, keys[index])
