"""Turn THCHS-30, as it unpacks, into Kaldi data directories.

Makes data/train, data/valid (the official dev) and data/test. What is in a set is told by the
names in its folder; audio and transcripts lie in the folder `data`, to which these are links or,
as the transcripts, files that hold a path.
"""

import argparse
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.recipe import Corpus, run_recipe
from cmkt.errors import CmktError

CORPUS = Corpus(
    name="THCHS-30",
    source="https://www.openslr.org/18, Apache-2.0",
    tree="""\
    data_thchs30/                  (6.5 GB as an archive)
        data/<speaker>_<number>.wav
        data/<speaker>_<number>.wav.trn    (words, Pinyin and phones on three lines)
        train/<speaker>_<number>.wav       (a link into data/)
        dev/  test/""",
    landmark="data/*.wav.trn",
    archives=Path(__file__).resolve().parents[1] / "archives.yaml",
)
SETS = {"train": "train", "valid": "dev", "test": "test"}


def read_words(path: Path) -> str:
    """Return the first line of a transcript, the words; empty if there is no transcript.

    Raises:
        CmktError: not UTF-8.
    """
    if not path.is_file():
        return ""
    line = path.read_bytes().partition(b"\n")[0]
    try:
        return " ".join(line.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        remedy = f"iconv -f GBK -t UTF-8 {path.name} > utf8.trn && mv utf8.trn {path.name}"
        raise CmktError("not UTF-8 text, perhaps GBK", path, 1, remedy) from error


def read_set(root: Path, side: str) -> DataDirectory:
    """Read one official set.

    Raises:
        CmktError: a link without its file, or a transcript that cannot be read.
    """
    data = DataDirectory({}, {})
    for link in sorted((root / side).glob("[!.]*.wav")):
        places = (root / "data" / link.name, link)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            what = f"a link to a file that is not there: {places[0]}"
            raise CmktError(what, link, remedy="unpack data_thchs30.tgz again")
        data.wav[link.stem] = str(path)
        data.utt2spk[link.stem] = link.stem.split("_")[0]
        words = read_words(root / "data" / f"{link.name}.trn")
        if words:
            data.text[link.stem] = words
    return data


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets from the folder data_thchs30."""
    return {name: read_set(root, side) for name, side in SETS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the archives."""
    parser.add_argument(
        "--with_noise",
        action="store_true",
        help="download resource.tgz as well: recordings of white, car and cafeteria noise",
    )


def needed(args: argparse.Namespace) -> list[str]:
    """Return the archives to download."""
    return ["data_thchs30", "resource"] if args.with_noise else ["data_thchs30"]


if __name__ == "__main__":
    description = __doc__.splitlines()[0]
    sys.exit(run_recipe(CORPUS, read_sets, description, add_arguments, needed))
