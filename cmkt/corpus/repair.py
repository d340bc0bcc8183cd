"""`cmkt validate --fix`: a copy of a data directory without what is wrong in it."""

import sys
from pathlib import Path

from cmkt.corpus.checks import DROPPED, Findings
from cmkt.corpus.datadir import DataDirectory, write_table
from cmkt.corpus.table_checks import COMPLETE, REQUIRED, SAME, Table
from cmkt.errors import CmktError
from cmkt.stage import Stage

EXTRA = ("utt2snr", "utt2noise", "utt2room")


def repair(folder: Path, tables: dict[str, Table], findings: Findings, output: Path) -> None:
    """Write a sorted copy of a data directory without the utterances that have errors.

    What is wrong in `text` costs the transcript only. Of lines that say the same one is kept.

    Args:
        folder: what is repaired; it is not changed.
        tables: its tables as far as they can be read.
        findings: all that was found in them.
        output: the directory to make, with the file `dropped`: id and reason.

    Raises:
        CmktError: `output` exists, a table is missing, or nothing is left.
    """
    for name in REQUIRED:
        if name not in tables:
            raise CmktError("--fix cannot make this table", folder / name, remedy="run stage 1")
    dropped, wordless = _reasons(findings)
    values = {name: table.values for name, table in tables.items()}
    kept = set(values["wav.scp"]).intersection(*(values[n] for n in COMPLETE if n in values))
    kept -= dropped.keys()
    if not kept:
        raise CmktError("no utterance is without errors", folder, remedy="see the report")
    made = {name: {k: v for k, v in values[name].items() if k in kept} for name in values}
    data = DataDirectory(
        made["wav.scp"],
        made["utt2spk"],
        made.get("spk1.scp"),
        {k: v for k, v in made.get("text", {}).items() if k not in wordless},
        {name: made[name] for name in EXTRA if name in made},
    )
    if "noise.scp" in tables:
        used = set(made["utt2noise"].values()) if "utt2noise" in made else values["noise.scp"]
        files = {name: path for name, path in values["noise.scp"].items() if name in used}
        data.extra["noise.scp"] = files
    reasons = {**{k: f"transcript only: {v}" for k, v in wordless.items()}, **dropped}
    stage = Stage(output, [], {"repaired": str(folder), "data": repr(data), "dropped": reasons})
    if not stage.is_done():
        if output.exists():
            raise CmktError("exists already", output, remedy="remove it or give --fix another name")
        with stage.working_directory() as work:
            data.write(work)
            write_table(work / "dropped", reasons)
    print(
        f"{output}: {len(kept)} utterances kept; what was dropped is in {output / 'dropped'}",
        file=sys.stderr,
    )


def _reasons(findings: Findings) -> tuple[dict[str, str], dict[str, str]]:
    """Return {id: why it is dropped} of utterances, and of those whose transcript only is."""
    dropped: dict[str, str] = {}
    wordless: dict[str, str] = {}
    for check in DROPPED:
        for entry in findings.entries.get(check, ()):
            if check == "duplicate_id" and entry.detail.startswith(SAME):
                continue
            if entry.utterance:
                reasons = wordless if entry.file.name == "text" else dropped
                reason = " ".join(f"{check} ({entry.detail})".split())
                reasons.setdefault(entry.utterance, reason)
    return dropped, wordless
