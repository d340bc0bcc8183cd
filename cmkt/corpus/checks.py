"""What `cmkt validate` checks, how grave each finding is, and how it is shown."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cmkt.corpus.source import UNREADABLE

SHOWN = 5  # examples of each check in a report


@dataclass(frozen=True)
class Check:
    """One thing that is checked.

    Args:
        severity: `error`, `warning`, or `share`: an error only if more than 1 % of the utterances
            have it, because `cmkt mix` skips those.
        what: the finding in words.
        remedy: what the user can do about it.
    """

    severity: str
    what: str
    remedy: str


CHECKS = {
    "missing_table": Check("error", "a table is missing", "run the stage that makes it"),
    "no_utterances": Check("error", "no utterances", "run stage 1 again"),
    "bad_line": Check("error", "not `<id> <value>` in UTF-8", "correct the lines or use --fix"),
    "duplicate_id": Check("error", "an id on several lines", "keep one of them or use --fix"),
    "unsorted": Check("error", "not in C order", "LC_ALL=C sort -o FILE FILE, or use --fix"),
    "ids_differ": Check(
        "error", "utterances that are not in all tables", "complete the tables or use --fix"
    ),
    "slash_in_id": Check("error", "ids with a slash", "rename them in all tables"),
    "pipe": Check(
        "error", "an scp that runs commands", "write the audio to files, or --allow_pipes"
    ),
    "spk2utt_differs": Check(
        "error", "spk2utt disagrees with utt2spk", "make it anew from utt2spk or use --fix"
    ),
    "unreadable_audio": Check(
        "share", "audio that cannot be read to its end", "replace the files or use --fix"
    ),
    "silent_audio": Check(
        "share", "audio that is silent (below -80 dBFS)", "replace the files or use --fix"
    ),
    "pair_differs": Check(
        "error",
        "input and reference differ in length or rate",
        "make them equal or use --fix",
    ),
    "mixed_rates": Check(
        "warning", "several sampling rates", "nothing: stage 2 converts them to --fs"
    ),
    "several_channels": Check(
        "warning", "audio of several channels", "choose one in stage 2: cmkt mix --channel"
    ),
    "short_audio": Check("warning", "shorter than 0.1 s", "drop them (--fix does)"),
    "long_audio": Check("warning", "longer than 60 s", "cut them, or expect large batches"),
    "clipped_audio": Check(
        "warning", "more than 0.1 % of the samples clipped", "take another master, or drop them"
    ),
    "dc_offset": Check("warning", "a mean above 1 % of full scale", "high-pass the audio"),
    "duplicate_audio": Check("warning", "the same samples under several ids", "keep one of them"),
    "empty_transcript": Check(
        "error", "a transcript without words", "remove the line, or use --fix"
    ),
    "speaking_rate": Check(
        "warning",
        "characters per second far from the rest",
        "listen: the transcript may be another utterance's",
    ),
    "wrong_script": Check(
        "warning", "a transcript in another script", "correct the text or --lang"
    ),
    "digits": Check("warning", "digits in a transcript", "write the words that are spoken"),
    "control_characters": Check(
        "warning", "control or replacement characters", "convert the text to clean UTF-8"
    ),
    "shared_speakers": Check(
        "error", "speakers who are in the training set too", "split by speaker"
    ),
    "shared_audio": Check("error", "audio that is in the training set too", "remove it from one"),
    "shared_noise": Check(
        "error", "noise recordings that the training set has too", "split the noise by recording"
    ),
}
#: Checks that `--allow` turns into warnings.
ERRORS = [name for name, check in CHECKS.items() if check.severity != "warning"]
#: An utterance that one of these found is left out by `--fix`.
DROPPED = (
    *("bad_line", "duplicate_id", "ids_differ", "slash_in_id", "pipe", "unreadable_audio"),
    *("silent_audio", "short_audio", "pair_differs", "empty_transcript"),
)


class Entry(NamedTuple):
    """One finding: where it is, what it is, and the utterance, if it is one's."""

    file: Path
    line: int | None
    detail: str
    utterance: str = ""

    def __str__(self) -> str:
        where = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(filter(None, [where, self.utterance, self.detail]))


@dataclass
class Findings:
    """All findings in one data directory, by check."""

    entries: dict[str, list[Entry]] = field(default_factory=dict)

    def add(self, check: str, *entry) -> None:
        """Add a finding; the further arguments are those of `Entry`."""
        self.entries.setdefault(check, []).append(Entry(*entry))

    def summary(self, utterances: int, allowed: set[str]) -> list[dict]:
        """Return the findings as JSON-like values, errors first.

        Args:
            utterances: how many there are, for shares.
            allowed: checks that are no errors here.
        """
        found = []
        for name, check in CHECKS.items():
            entries = self.entries.get(name)
            if not entries:
                continue
            concerned = len({entry.utterance for entry in entries if entry.utterance})
            share = concerned / utterances if utterances else 0.0
            severity = check.severity
            if severity == "share":
                severity = "error" if share > UNREADABLE else "warning"
            found.append({
                "check": name,
                "severity": "warning" if name in allowed else severity,
                "count": len(entries),
                "share": round(share, 6),
                "what": check.what,
                "remedy": check.remedy,
                "examples": [
                    {
                        "file": str(entry.file),
                        "line": entry.line,
                        "utterance": entry.utterance or None,
                        "detail": entry.detail,
                    }
                    for entry in entries[:SHOWN]
                ],
            })  # fmt: skip
        return sorted(found, key=lambda finding: finding["severity"] != "error")


def format_set(report: dict) -> str:
    """Format the report of one data directory as text.

    Args:
        report: what `cmkt.corpus.validate.validate` returns for it.
    """
    seconds = report["seconds"]
    lines = [
        f"{report['directory']} ({report['kind']}): {report['utterances']} utterances, "
        f"{report['hours']:.2f} h, {report['speakers']} speakers",
        "  " + "; ".join(
            [f"{rate} Hz: {count}" for rate, count in report["rates"].items()]
            + [f"channels {number}: {count}" for number, count in report["channels"].items()]
        ),
    ]  # fmt: skip
    if seconds:
        lines.append(
            "  seconds: {min} shortest, {p5} at 5 %, {median} median, {p95} at 95 %, "
            "{max} longest".format(**seconds)
        )
    if report["transcripts"]:
        lines.append(
            f"  transcripts: {report['transcripts']}, {report['without_text_share']:.1%} of the "
            f"utterances have none; language: {report['language'] or 'not known'}"
        )
    else:
        lines.append("  no transcripts")
    for finding in report["findings"]:
        share = f", {finding['share']:.1%} of the utterances" if finding["share"] else ""
        lines.append(
            f"  {finding['severity'].upper()} {finding['check']} ({finding['count']}{share}): "
            f"{finding['what']}"
        )
        for example in finding["examples"]:
            entry = Entry(
                example["file"], example["line"], example["detail"], example["utterance"] or ""
            )
            lines.append(f"    {entry}")
        if finding["count"] > SHOWN:
            lines.append(f"    and {finding['count'] - SHOWN} more")
        lines.append(f"    remedy: {finding['remedy']}")
    if not report["findings"]:
        lines.append("  nothing found")
    return "\n".join(lines)
