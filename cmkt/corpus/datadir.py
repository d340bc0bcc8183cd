"""Kaldi data directories: read, validate, write.

A data directory holds `wav.scp` (the input), `spk1.scp` (the clean reference; absent when the
speech itself is clean), `utt2spk`, `spk2utt`, and optionally `text`, which may lack any number
of utterances. All files are sorted by utterance id in C order and hold the same ids.
"""

from dataclasses import dataclass, field
from pathlib import Path

from cmkt.errors import CmktError
from cmkt.stage import atomic_file


def read_table(path: str | Path, lenient: bool = False) -> dict[str, str]:
    """Read a Kaldi table: an id and a value on each line.

    Args:
        path: for example `data/train/wav.scp`.
        lenient: take lines in any order and ids without a value, as other recipes write them.

    Returns:
        {id: rest of the line}, in the file's order.

    Raises:
        CmktError: missing file, bytes that are not UTF-8, a line without a value, an id that
            comes twice or out of order; names the line.
    """
    path = Path(path)
    if not path.exists():
        raise CmktError("no such file", path, remedy="run the stage that makes it")
    table: dict[str, str] = {}
    last = ""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                words = raw.decode("utf-8").strip().split(maxsplit=1)
            except UnicodeDecodeError as error:
                raise CmktError(
                    "not UTF-8 text", path, number, "convert it, for example with iconv"
                ) from error
            if lenient and len(words) == 1:
                words.append("")
            if len(words) < 2:
                raise CmktError(
                    f"an id without a value: {words[0]!r}" if words else "an empty line",
                    path,
                    number,
                    "each line is `<id> <value>`",
                )
            key, value = words
            if key in table:
                raise CmktError(f"id {key} comes twice", path, number, "remove one of the two")
            # Comparing code points equals comparing UTF-8 bytes, which is `LC_ALL=C sort`.
            if key < last and not lenient:
                raise CmktError(
                    f"not sorted: {key} comes after {last}",
                    path,
                    number,
                    f"LC_ALL=C sort -o {path} {path}",
                )
            table[key] = value
            last = key
    return table


def write_table(path: str | Path, table: dict[str, object]) -> None:
    """Write `{id: value}` as a sorted Kaldi table, under its final name only when complete."""
    with atomic_file(Path(path)) as stream:
        for key in sorted(table):
            stream.write(f"{key} {table[key]}\n")


@dataclass
class DataDirectory:
    """The tables of one Kaldi data directory; each maps an utterance id to a value.

    Args:
        wav: audio file of the input.
        utt2spk: speaker.
        spk1: audio file of the clean reference; None when the input is clean speech.
        text: transcripts; may lack utterances.
        extra: further tables by file name, for example `utt2snr`.
    """

    wav: dict[str, str]
    utt2spk: dict[str, str]
    spk1: dict[str, str] | None = None
    text: dict[str, str] = field(default_factory=dict)
    extra: dict[str, dict[str, object]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, allow_pipes: bool = False) -> "DataDirectory":
        """Read and check a data directory.

        Args:
            folder: the directory.
            allow_pipes: accept `command |` in an scp, which makes a data file run commands.

        Raises:
            CmktError: what is wrong, with file, line and remedy.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CmktError("no such data directory", folder, remedy="run stage 1 first")
        wav = read_table(folder / "wav.scp")
        utt2spk = read_table(folder / "utt2spk")
        spk1 = read_table(folder / "spk1.scp") if (folder / "spk1.scp").exists() else None
        text = read_table(folder / "text") if (folder / "text").exists() else {}
        for name, table in (("wav.scp", wav), ("spk1.scp", spk1 or {})):
            for number, (key, value) in enumerate(table.items(), 1):
                if not allow_pipes and "|" in value:
                    raise CmktError(
                        f"a pipe: {key} would run a shell command",
                        folder / name,
                        number,
                        "write the audio to files, or trust it with --allow_pipes",
                    )
        if not wav:
            raise CmktError("no utterances", folder / "wav.scp", remedy="run stage 1 again")
        for name, table in (("utt2spk", utt2spk), ("spk1.scp", spk1)):
            if table is None:
                continue
            for number, key in enumerate(wav, 1):
                if key not in table:
                    raise CmktError(
                        f"utterance {key} is not in {name}",
                        folder / "wav.scp",
                        number,
                        f"add it to {folder / name}",
                    )
        for name, table in (("utt2spk", utt2spk), ("spk1.scp", spk1 or {}), ("text", text)):
            for number, key in enumerate(table, 1):
                if key not in wav:
                    raise CmktError(
                        f"unknown utterance {key}: not in wav.scp",
                        folder / name,
                        number,
                        "remove the line or add its audio to wav.scp",
                    )
        return cls(wav, utt2spk, spk1, text)

    def write(self, folder: str | Path) -> None:
        """Write all tables, and `spk2utt`, into an existing folder."""
        folder = Path(folder)
        write_table(folder / "utt2spk", self.utt2spk)
        speakers: dict[str, list[str]] = {}
        for utterance in sorted(self.utt2spk):
            speakers.setdefault(self.utt2spk[utterance], []).append(utterance)
        write_table(folder / "spk2utt", {s: " ".join(u) for s, u in speakers.items()})
        if self.spk1 is not None:
            write_table(folder / "spk1.scp", self.spk1)
        if self.text:
            write_table(folder / "text", self.text)
        for name, table in self.extra.items():
            write_table(folder / name, table)
        write_table(folder / "wav.scp", self.wav)
