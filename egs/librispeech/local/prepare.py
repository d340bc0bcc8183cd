"""Turn LibriSpeech, as it unpacks, into Kaldi data directories.

Makes data/train, data/valid and, for each test subset, data/<name with - as _>. Utterances
without a transcript are kept: they train enhancement and have no line in `text`.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.errors import CmktError
from cmkt.stage import Stage

SIZES = {
    "train-clean-100": "6.3 GB",
    "train-clean-360": "23 GB",
    "train-other-500": "30 GB",
    "dev-clean": "337 MB",
    "dev-other": "314 MB",
    "test-clean": "346 MB",
    "test-other": "328 MB",
}
EXPECTED = """\
LibriSpeech: https://www.openslr.org/12, CC BY 4.0. Give --corpus_dir the folder LibriSpeech, or the
one it lies in:
    LibriSpeech/
        train-clean-100/
            <speaker>/<chapter>/<speaker>-<chapter>-<number>.flac
            <speaker>/<chapter>/<speaker>-<chapter>.trans.txt
        dev-clean/ ...
Needed here: """


def find_subset(corpus_dir: str, subset: str) -> Path:
    """Return the folder of a subset.

    Raises:
        CmktError: it is not there, or holds no audio.
    """
    remedy = "see below for what to download" if corpus_dir else "give --corpus_dir"
    if not corpus_dir or not Path(corpus_dir).is_dir():
        raise CmktError("no such corpus folder", corpus_dir or "--corpus_dir", remedy=remedy)
    root = Path(corpus_dir).resolve()
    if (root / "LibriSpeech").is_dir():
        root = root / "LibriSpeech"
    folder = root / subset
    if not folder.is_dir():
        raise CmktError("no such LibriSpeech subset", folder, remedy=remedy)
    if next(folder.glob("*/*/*.flac"), None) is None:
        raise CmktError("no <speaker>/<chapter>/*.flac in it", folder, remedy=remedy)
    return folder


def read_subsets(folders: list[Path]) -> tuple[DataDirectory, list[Path], list[int]]:
    """Read subsets into one data directory.

    Args:
        folders: as `find_subset` gives them.

    Returns:
        the data, the transcript files, and the size of each audio file in bytes.

    Raises:
        CmktError: an utterance id that comes twice, a file name that does not start with its
            speaker, a transcript without audio, or a transcript file that cannot be read.
    """
    data, sizes, transcripts = DataDirectory({}, {}), [], []
    for folder in folders:
        for path in sorted(folder.glob("*/*/*.flac")):
            utterance, speaker = path.stem, path.parent.parent.name
            if utterance in data.wav:
                raise CmktError(
                    f"utterance {utterance} is also {data.wav[utterance]}",
                    path,
                    remedy="remove one",
                )
            if utterance.split("-")[0] != speaker:
                raise CmktError(f"not an utterance of speaker {speaker}", path, remedy="move it")
            data.wav[utterance], data.utt2spk[utterance] = str(path), speaker
            sizes.append(path.stat().st_size)
        for path in sorted(folder.glob("*/*/*.trans.txt")):
            transcripts.append(path)
            for line, (utterance, words) in enumerate(read_table(path).items(), 1):
                if Path(data.wav.get(utterance, "")).parent != path.parent:
                    raise CmktError(
                        f"transcript for unknown utterance {utterance}",
                        path,
                        line,
                        f"add {utterance}.flac or remove the line",
                    )
                data.text[utterance] = words
    return data, transcripts, sizes


def prepare(name: str, corpus_dir: str, subsets: list[str], data_dir: Path) -> None:
    """Make data_dir/name from subsets; does nothing if it is up to date."""
    if len(set(subsets)) != len(subsets):
        raise CmktError(f"a subset of {name} is given twice: {' '.join(subsets)}")
    data, transcripts, sizes = read_subsets([find_subset(corpus_dir, s) for s in subsets])
    listing = hashlib.sha256(json.dumps([data.wav, sizes]).encode()).hexdigest()
    stage = Stage(data_dir / name, transcripts, {"subsets": subsets, "listing": listing})
    if not stage.is_done():
        data_dir.mkdir(parents=True, exist_ok=True)
        with stage.working_directory() as work:
            data.write(work)
    print(f"{data_dir / name}: {len(data.wav)} utterances, {len(data.text)} with a transcript")


def main() -> int:
    """Prepare all sets; return the exit status."""
    parser = argparse.ArgumentParser(prog="local/data.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus_dir", default="", help="LibriSpeech, or the folder it lies in")
    parser.add_argument("--data_dir", type=Path, default="data", help="(default %(default)s)")
    for group, default, note in (
        ("train", "train-clean-100", ""),
        ("valid", "dev-clean", ""),
        ("test", "test-clean test-other", "each becomes a set of its own; "),
    ):
        parser.add_argument(
            f"--{group}_subsets", nargs="+", default=[default], help=f"{note}default {default}"
        )
    parser.add_argument("--seed", type=int, help="not used: nothing is drawn here")
    parser.add_argument("--nj", type=int, help="not used: only names and texts are read")
    args = parser.parse_args()
    # Subsets may come as words or as one quoted list.
    train, valid, test = (
        " ".join(words).split()
        for words in (args.train_subsets, args.valid_subsets, args.test_subsets)
    )
    sets = {"train": train, "valid": valid, **{s.replace("-", "_"): [s] for s in test}}
    try:
        for subset in [*train, *valid, *test]:  # all of them before any is made
            find_subset(args.corpus_dir, subset)
        for name, subsets in sets.items():
            prepare(name, args.corpus_dir, subsets, args.data_dir)
    except CmktError as error:
        print(f"local/data.sh: error: {error}", file=sys.stderr)
        if "see below" in str(error) or not args.corpus_dir:
            needed = [f"{s} ({SIZES.get(s, 'size unknown')})" for s in [*train, *valid, *test]]
            print(EXPECTED + ", ".join(needed), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
