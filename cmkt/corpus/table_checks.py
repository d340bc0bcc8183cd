"""Checks of the tables of a data directory; all that is wrong is found, not only the first."""

import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from cmkt.corpus.checks import Findings

#: Tables that name a value of each utterance; `text` and those of `cmkt mix` may be absent.
REQUIRED = ("wav.scp", "utt2spk")
COMPLETE = ("utt2spk", "spk1.scp", "utt2snr", "utt2noise")  # hold every utterance
TABLES = ("wav.scp", "spk1.scp", "utt2spk", "text", "utt2snr", "utt2noise", "utt2room")
OTHERS = ("spk2utt", "noise.scp")  # their keys are no utterances
SAME = "the same value"  # of an id that comes twice


@dataclass
class Table:
    """A table as far as it can be read.

    Args:
        path: the file.
        values: {id: value} of the first line of each id, in the file's order.
        numbers: the line of each id, in the same order.
    """

    path: Path
    values: dict[str, str] = field(default_factory=dict)
    numbers: array = field(default_factory=lambda: array("I"))
    _lines: dict[str, int] | None = None

    def line(self, key: str) -> int:
        """Return the line of an id."""
        if self._lines is None:
            self._lines = dict(zip(self.values, self.numbers, strict=True))
        return self._lines[key]


def read_tables(
    folder: Path, findings: Findings, names: tuple[str, ...] = (*TABLES, *OTHERS)
) -> dict[str, Table]:
    """Read those tables that there are.

    Args:
        folder: the data directory.
        findings: gets bad lines, duplicate ids, wrong order and missing tables.
        names: which tables.

    Returns:
        tables by file name.
    """
    tables = {}
    for name in names:
        path = folder / name
        if path.is_file():
            tables[name] = _read(path, findings)
        elif name in REQUIRED or name == "spk2utt":
            findings.add("missing_table", path, None, "no such file")
    return tables


def _read(path: Path, findings: Findings) -> Table:
    table, again = Table(path), []
    last = ""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                words = raw.decode("utf-8").strip().split(maxsplit=1)
            except UnicodeDecodeError:
                name = raw.split(maxsplit=1)[0].decode("utf-8", "replace")
                findings.add("bad_line", path, number, "not UTF-8 text", name)
                continue
            if len(words) < 2:
                if words and path.name == "text":
                    findings.add("empty_transcript", path, number, "no words", words[0])
                elif words:
                    findings.add("bad_line", path, number, "an id without a value", words[0])
                else:
                    findings.add("bad_line", path, number, "an empty line")
                continue
            key, value = sys.intern(words[0]), words[1]  # one copy of each id for all tables
            if key in table.values:
                again.append((number, key, table.values[key] == value))
                continue
            if key < last:  # code points compare as UTF-8 bytes do, which is C order
                findings.add("unsorted", path, number, f"{key} comes after {last}")
            table.values[key] = value
            table.numbers.append(number)
            last = key
    for number, key, same in again:
        detail = f"{SAME if same else 'another value'} in line {table.line(key)}"
        findings.add("duplicate_id", path, number, detail, key)
    return table


def check_tables(tables: dict[str, Table], allow_pipes: bool, findings: Findings) -> None:
    """Compare the tables with each other.

    Args:
        tables: see `read_tables`; holds `wav.scp` and `utt2spk`.
        allow_pipes: accept commands in an scp.
        findings: gets what is wrong.
    """
    wav = tables["wav.scp"]
    if not wav.values:
        findings.add("no_utterances", wav.path, None, "")
    for key in wav.values:
        if "/" in key:
            findings.add("slash_in_id", wav.path, wav.line(key), "", key)
    for name in ("wav.scp", "spk1.scp"):
        if name in tables and not allow_pipes:
            for key, value in tables[name].values.items():
                if "|" in value:
                    findings.add("pipe", tables[name].path, tables[name].line(key), value, key)
    for name in TABLES[1:]:
        table = tables.get(name)
        if table is None:
            continue
        for key in table.values.keys() - wav.values.keys():
            findings.add("ids_differ", table.path, table.line(key), "not in wav.scp", key)
        for key in wav.values.keys() - table.values.keys() if name in COMPLETE else ():
            findings.add("ids_differ", wav.path, wav.line(key), f"not in {name}", key)
    if "ids_differ" in findings.entries:
        findings.entries["ids_differ"].sort(key=lambda entry: (entry.file, entry.line))
    if "spk2utt" in tables:
        _check_speakers(tables["spk2utt"], tables["utt2spk"], findings)


def _check_speakers(spk2utt: Table, utt2spk: Table, findings: Findings) -> None:
    listed = {u: speaker for speaker, names in spk2utt.values.items() for u in names.split()}
    for utterance, speaker in utt2spk.values.items():
        other = listed.pop(utterance, None)
        if other != speaker:
            where = f"is under {other}" if other else "is missing"
            line = spk2utt.line(other) if other else None
            detail = f"{utterance} of {speaker} {where}"
            findings.add("spk2utt_differs", spk2utt.path, line, detail)
    for utterance, speaker in listed.items():
        detail = f"{utterance} is not in utt2spk"
        findings.add("spk2utt_differs", spk2utt.path, spk2utt.line(speaker), detail)
