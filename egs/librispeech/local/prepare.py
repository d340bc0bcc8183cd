"""Turn LibriSpeech, as it unpacks, into Kaldi data directories.

Makes data/train, data/valid and, for each test subset, data/<name with - as _>. Utterances
without a transcript are kept: they train enhancement and have no line in `text`.
"""

import argparse
import os
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.corpus.recipe import Corpus, NoCorpus, run_recipe
from cmkt.errors import CmktError

CORPUS = Corpus(
    name="LibriSpeech",
    source="https://www.openslr.org/12, CC BY 4.0",
    tree="""\
    LibriSpeech/
        train-clean-100/  (6.4 GB; further: train-clean-360, 23 GB, train-other-500, 31 GB)
            <speaker>/<chapter>/<speaker>-<chapter>-<number>.flac
            <speaker>/<chapter>/<speaker>-<chapter>.trans.txt
        dev-clean/  test-clean/  test-other/  dev-other/  (0.3 GB each)""",
    landmark="*-[co]*/[0-9]*/[0-9]*/*.flac",
    archives=Path(__file__).resolve().parents[1] / "archives.yaml",
)


def read_subset(data: DataDirectory, folder: Path) -> None:
    """Add the utterances of one subset to a data directory.

    Raises:
        CmktError: no such subset, an utterance that comes twice, a file name that does not start
            with its speaker, a transcript without audio or one that cannot be read.
    """
    if not folder.is_dir():
        raise NoCorpus("no such LibriSpeech subset", folder, remedy="unpack its archive there")
    empty = True
    # os.scandir: LibriSpeech has 290 000 files, and pathlib takes its time.
    for speaker in _entries(folder):
        for chapter in _entries(speaker.path):
            entries = _entries(chapter.path)
            for entry in entries:
                if entry.name.endswith(".flac"):
                    empty = False
                    _add_utterance(data, entry, speaker.name)
            for entry in entries:
                if entry.name.endswith(".trans.txt"):
                    _add_transcripts(data, entry)
    if empty:
        raise NoCorpus("no <speaker>/<chapter>/*.flac in it", folder, remedy="unpack its archive")


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except NotADirectoryError:
        return []


def _add_utterance(data: DataDirectory, entry: os.DirEntry, speaker: str) -> None:
    utterance = entry.name.removesuffix(".flac")
    if utterance in data.wav:
        other = data.wav[utterance]
        raise CmktError(f"utterance {utterance} is also {other}", entry.path, remedy="remove one")
    if utterance.split("-")[0] != speaker:
        raise CmktError(f"not an utterance of speaker {speaker}", entry.path, remedy="move it")
    data.wav[utterance], data.utt2spk[utterance] = entry.path, speaker


def _add_transcripts(data: DataDirectory, entry: os.DirEntry) -> None:
    folder = os.path.dirname(entry.path)
    for line, (utterance, words) in enumerate(read_table(entry.path).items(), 1):
        if os.path.dirname(data.wav.get(utterance, "")) != folder:
            what = f"transcript for unknown utterance {utterance}"
            remedy = f"add {utterance}.flac or remove the line"
            raise CmktError(what, entry.path, line, remedy)
        data.text[utterance] = words


def sets_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the subsets of each set."""
    # Subsets may come as words or as one quoted list.
    train, valid, test = (
        " ".join(words).split()
        for words in (args.train_subsets, args.valid_subsets, args.test_subsets)
    )
    return {"train": train, "valid": valid, **{s.replace("-", "_"): [s] for s in test}}


def needed(args: argparse.Namespace) -> list[str]:
    """Return the archives to download: each holds one subset."""
    return [subset for subsets in sets_of(args).values() for subset in subsets]


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets from the folder LibriSpeech."""
    sets = {}
    for name, subsets in sets_of(args).items():
        sets[name] = DataDirectory({}, {})
        for subset in subsets:
            read_subset(sets[name], root / subset)
    return sets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose subsets."""
    for group, default, note in (
        ("train", "train-clean-100", ""),
        ("valid", "dev-clean", ""),
        ("test", "test-clean test-other", "each becomes a set of its own; "),
    ):
        parser.add_argument(
            f"--{group}_subsets", nargs="+", default=[default], help=f"{note}default {default}"
        )


if __name__ == "__main__":
    description = __doc__.splitlines()[0]
    sys.exit(run_recipe(CORPUS, read_sets, description, add_arguments, needed))
