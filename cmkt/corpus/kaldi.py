"""Stage 1 for Kaldi data directories: one to be split by speaker, or one for each set.

--corpus_dir holds wav.scp (then it is split: 80 % train, 10 % valid, 10 % test of the speakers), or
a directory for each set: those named train, valid and test (or tr, tt; val, dev, cv), or what
--train, --valid and --test name; what is missing of valid and test is a tenth of the training
speakers each.

Pairs: a spk1.scp in the directory, as ESPnet writes it, or a second directory, --clean_dir, with
the same ids and, if there are several sets, the same names of directories.

Read are wav.scp, segments (each is cut to a file of its own), utt2spk (without it each utterance
is a speaker), text, spk1.scp, utt2snr and utt2noise; lines need not be sorted.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

import soundfile

from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.corpus.noise import SPLIT_FOLDERS
from cmkt.corpus.recipe import Corpus, NoCorpus, Segment, run_recipe
from cmkt.corpus.split import split_off
from cmkt.errors import CmktError

CORPUS = Corpus(
    name="the Kaldi data directory",
    source="any Kaldi or ESPnet recipe makes one",
    tree="""\
    DIR/                  (or DIR/train, DIR/valid, DIR/test; see --train)
        wav.scp           <id> <file>
        utt2spk           <id> <speaker>                   (optional)
        text              <id> <words>                     (optional)
        segments          <id> <id in wav.scp> <from> <to> (optional)
        spk1.scp          <id> <clean file>                (optional; or --clean_dir)""",
    landmark="**",  # found by its files, below
)
FIX = "remove the line, or run utils/fix_data_dir.sh on a copy"
TABLES = ("utt2snr", "utt2noise")  # of pairs; the report tells scores apart by them


def read_lines(path: Path) -> dict[str, tuple[str, int]]:
    """Read a Kaldi table in any order: {id: (rest of the line, line number)}."""
    table = read_table(path, lenient=True)
    return {key: (value, number) for number, (key, value) in enumerate(table.items(), 1)}


def piped_file(command: str) -> str | None:
    """Return the file that a pipe only decodes: `flac -c -d -s F |`, `sph2pipe -f wav F |`.

    None for every other command, also for one that selects a channel or cuts.
    """
    if re.search(r"[|;&<>$`*?~]", command[:-1]):
        return None
    try:
        program, *words = shlex.split(command[:-1])
    except ValueError:
        return None
    patterns = {"flac": r"-[cds]+|--(stdout|decode|silent|totally-silent)", "sph2pipe": r"-p"}
    name = os.path.basename(program)
    if name not in patterns:
        return None
    if name == "sph2pipe" and words[:2] in (["-f", "wav"], ["-f", "rif"]):
        words = words[2:]
    files = [word for word in words if not re.fullmatch(patterns[name], word)]
    return files[0] if len(files) == 1 and not files[0].startswith("-") else None


class Locator:
    """Makes relative paths of an scp absolute.

    They are relative to the current folder, to the data directory or to a folder above it: the
    first where the first relative path exists.

    Args:
        scp: the file that the paths stand in.
    """

    def __init__(self, scp: Path):
        self.scp = scp
        self.base: Path | None = None

    def absolute(self, path: str, line: int) -> str:
        """Return the absolute path.

        Raises:
            CmktError: the first relative path exists nowhere.
        """
        if os.path.isabs(path):
            return path
        if self.base is None:
            places = [Path.cwd(), *self.scp.parents]
            self.base = next((place for place in places if (place / path).is_file()), None)
            if self.base is None:
                what = f"no such audio file: {path}, from here, {self.scp.parent} or above"
                raise CmktError(what, self.scp, line, "write absolute paths")
            print(f"{self.scp}: paths are relative to {self.base}")
        return str(self.base / path)


def read_scp(path: Path, allow_pipes: bool) -> dict[str, str]:
    """Read the audio files of an scp: {id: absolute path, or a pipe if these are allowed}.

    Pipes that only decode are replaced by their file where libsndfile reads it.

    Raises:
        CmktError: an entry that is no file; names its line.
    """
    locator, files, replaced = Locator(path), {}, 0
    for key, (value, line) in read_lines(path).items():
        if not value:
            raise CmktError(f"{key} has no file", path, line, "each line is `<id> <file>`")
        if re.search(r"\.ark:\d+$", value):
            what = f"{key} lies in an archive: {value}"
            raise CmktError(what, path, line, "write the audio to files, for example flac")
        decoded = piped_file(value) if value.endswith("|") else None
        if decoded:
            decoded = locator.absolute(decoded, line)
            # A missing file is named later, as every other; a shortened sphere file needs its pipe.
            if not os.path.exists(decoded) or _is_readable(decoded):
                value, replaced = decoded, replaced + 1
        if "|" not in value:
            value = locator.absolute(value, line)
        elif not (allow_pipes and value.endswith("|")):
            what = f"a pipe: {key} would run a shell command"
            remedy = "write the audio to files, or trust it with --allow_pipes"
            raise CmktError(what, path, line, remedy)
        files[key] = value
    if replaced:
        print(f"{path}: {replaced} pipes only decode a file that is read directly instead")
    pipes = sum(value.endswith("|") for value in files.values())
    if pipes:
        options = "--validate_args --allow_pipes --mix_args --allow_pipes"
        print(f"{path}: {pipes} pipes kept; run.sh also needs {options}")
    return files


def _is_readable(path: str) -> bool:
    try:
        return soundfile.info(path).frames > 0
    except soundfile.LibsndfileError:
        return False


def cut(folder: Path, files: dict[str, str], scp: Path) -> dict[str, str | Segment]:
    """Apply `segments` of a data directory to recordings, if it has any.

    Raises:
        CmktError: a segment that is malformed, of an unknown recording, or of a pipe.
    """
    path = folder / "segments"
    if not path.exists():
        return dict(files)
    pieces: dict[str, str | Segment] = {}
    for utterance, (value, line) in read_lines(path).items():
        try:
            recording, start, end = value.split()
            first, last = float(start), float(end)
        except ValueError as error:
            what = "not `<utterance> <recording> <start> <end>`"
            raise CmktError(what, path, line, "correct the line") from error
        if recording not in files:
            raise CmktError(f"recording {recording} is not in {scp}", path, line, FIX)
        if files[recording].endswith("|"):
            what = f"recording {recording} is a pipe, which cannot be cut"
            raise CmktError(what, path, line, "write it to a file")
        if first < 0 or (last != -1 and last <= first):  # Kaldi: -1 is the end of the recording
            raise CmktError(f"no segment from {start} to {end}", path, line, "correct the line")
        pieces[utterance] = Segment(files[recording], first, None if last == -1 else last)
    return pieces


def read_data_directory(
    folder: Path, clean_folder: Path | None = None, allow_pipes: bool = False
) -> DataDirectory:
    """Read a Kaldi data directory as other recipes write it.

    Args:
        folder: holds wav.scp.
        clean_folder: a directory with the clean speech of the same ids.
        allow_pipes: keep `command |`, which makes a data file run commands.

    Raises:
        CmktError: what is wrong, with file, line and remedy.
    """
    scp, reference = folder / "wav.scp", folder / "spk1.scp"
    data = DataDirectory(cut(folder, read_scp(scp, allow_pipes), scp), {})
    for utterance in data.wav:
        if "/" in utterance:
            what = f"an utterance id cannot hold a slash: {utterance}"
            raise CmktError(what, folder, remedy="rename it in all tables")
    clean_source = folder
    if clean_folder is not None:
        if reference.exists():
            raise CmktError("a clean reference beside --clean_dir", reference, None, "choose one")
        clean_source, reference = clean_folder, clean_folder / "wav.scp"
    if reference.exists() or clean_folder is not None:
        data.spk1 = cut(clean_source, read_scp(reference, allow_pipes), reference)
        _check_same_utterances(data, scp, reference)

    def column(name: str, *folders: Path) -> dict[str, str]:
        path = next((f / name for f in folders if (f / name).exists()), None)
        return {} if path is None else _read_column(path, data.wav)

    # Of a pair of directories either may hold what is known of the utterances.
    places = (folder, *([clean_folder] if clean_folder else []))
    data.text = column("text", *places)
    # ESPnet's enhancement recipes write "dummy" for want of transcripts.
    if len(data.text) > 1 and len(set(data.text.values())) == 1:
        print(f"{folder}: every transcript is {next(iter(data.text.values()))!r}: left out")
        data.text = {}
    data.utt2spk = column("utt2spk", *places)
    if not data.utt2spk:
        print(f"{folder}: no utt2spk: each utterance is a speaker of its own")
        data.utt2spk = {utterance: utterance for utterance in data.wav}
    for utterance in data.wav:
        if utterance not in data.utt2spk:
            what = f"utterance {utterance} has no speaker"
            raise CmktError(what, folder / "utt2spk", remedy="add it, or drop its audio")
    if data.spk1 is not None:
        data.extra = {name: table for name in TABLES if (table := column(name, folder))}
    return data


def _read_column(path: Path, known: dict) -> dict[str, str]:
    """Read one value per utterance; those without one are left out."""
    values = {}
    for utterance, (value, line) in read_lines(path).items():
        if utterance not in known:
            raise CmktError(f"unknown utterance {utterance}: no audio", path, line, FIX)
        if value:
            values[utterance] = value
    return values


def _check_same_utterances(data: DataDirectory, noisy: Path, clean: Path) -> None:
    for have, lack, file in ((data.wav, data.spk1, clean), (data.spk1, data.wav, noisy)):
        missing = sorted(have.keys() - lack.keys())
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            what = f"{len(missing)} utterances of the other side are missing: {some}"
            raise CmktError(what, file, remedy="add them, or drop them from the other side")


def find_sets(root: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Find the data directory of each set; one without sets counts as `train`.

    Raises:
        NoCorpus: no data directory there, or not those that were named.
    """
    named = {"train": args.train, "valid": args.valid, "test": args.test}
    if (root / "wav.scp").exists():
        if any(named.values()):
            raise NoCorpus(
                "is itself a data directory", root, remedy="leave out --train, --valid, --test"
            )
        return {"train": root}
    held = {path.parent.name: path.parent for path in sorted(root.glob("*/wav.scp"))}
    if not held:
        raise NoCorpus("no wav.scp here, nor in a folder in it", root)
    sets: dict[str, Path] = {}
    for side, names in named.items():
        if not names:
            names = [name for name in held if name.lower() in SPLIT_FOLDERS[side]][:1]
        for name in names:
            if name not in held:
                raise NoCorpus(f"no wav.scp in {name}; there are {', '.join(held)}", root)
            # Several test sets keep their names.
            key = side if len(names) == 1 else name.replace("-", "_")
            if key in sets or held[name] in sets.values():
                raise CmktError(f"{name} would be two sets", root, remedy="correct the options")
            sets[key] = held[name]
    if "train" not in sets:
        remedy = "say which with --data_args '--train NAME --valid NAME --test NAME'"
        raise NoCorpus(f"no train among {', '.join(held)}", root, remedy=remedy)
    unused = [name for name, folder in held.items() if folder not in sets.values()]
    if unused:
        print(f"{root}: unused: {', '.join(unused)} (--train, --valid and --test name sets)")
    return sets


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets, and split off those that are missing."""
    sets = {}
    for name, folder in find_sets(root, args).items():
        clean = None
        if args.clean_dir:
            clean = args.clean_dir.resolve() / folder.relative_to(root)
            if not clean.is_dir():
                remedy = "--clean_dir wants an absolute path, and the folders of --corpus_dir in it"
                raise CmktError("no such folder of clean speech", clean, remedy=remedy)
        sets[name] = read_data_directory(folder, clean, args.allow_pipes)
    missing = [] if sets.keys() - {"train", "valid"} else ["test"]
    missing += [] if "valid" in sets else ["valid"]
    return split_off(sets, missing, root) if missing else sets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name sets, references and pipes."""
    for side in ("train", "valid"):
        parser.add_argument(
            f"--{side}", nargs=1, metavar="NAME", help=f"folder of the set {side} (default: found)"
        )
    parser.add_argument(
        "--test",
        nargs="+",
        metavar="NAME",
        help="folder of the set test; several become sets of their own names (run.sh --test_sets)",
    )
    parser.add_argument("--clean_dir", type=Path, help="clean speech; --corpus_dir is then noisy")
    parser.add_argument(
        "--allow_pipes",
        action="store_true",
        help="keep entries that are commands; only for files you trust",
    )


if __name__ == "__main__":
    sys.exit(run_recipe(CORPUS, read_sets, __doc__, add_arguments))
