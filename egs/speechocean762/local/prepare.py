"""Turn speechocean762, as it unpacks, into Kaldi data directories.

Makes data/train, data/valid (a tenth of the official training speakers) and data/test.
"""

import argparse
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.corpus.recipe import Corpus, NoCorpus, run_recipe
from cmkt.corpus.split import select, split_groups
from cmkt.errors import CmktError

CORPUS = Corpus(
    name="speechocean762",
    source="https://www.openslr.org/101, CC BY 4.0",
    tree="""\
    speechocean762/                (0.5 GB as an archive)
        WAVE/SPEAKER<speaker>/<utterance>.WAV
        train/wav.scp    (paths relative to the folder speechocean762)
        train/utt2spk  train/text
        test/""",
    landmark="WAVE/SPEAKER*",
    archives=Path(__file__).resolve().parents[1] / "archives.yaml",
)
AGAIN = "unpack speechocean762.tar.gz again"


def read_side(root: Path, side: str) -> DataDirectory:
    """Read one official set.

    Raises:
        CmktError: a table or an audio file is missing, or the tables do not fit together.
    """
    tables = {}
    for name in ("wav.scp", "utt2spk", "text"):
        path = root / side / name
        if not path.is_file():
            raise NoCorpus("no such file", path, remedy=AGAIN)
        tables[name] = read_table(path)
    wav, utt2spk, text = tables.values()
    for line, (utterance, path) in enumerate(wav.items(), 1):
        if not (root / path).is_file():
            what = f"no audio of utterance {utterance}: {root / path}"
            raise CmktError(what, root / side / "wav.scp", line, AGAIN)
        if utterance not in utt2spk:
            what = f"utterance {utterance} is not in utt2spk"
            raise CmktError(what, root / side / "wav.scp", line, AGAIN)
    for name in ("utt2spk", "text"):
        for line, utterance in enumerate(tables[name], 1):
            if utterance not in wav:
                what = f"utterance {utterance} is not in wav.scp"
                raise CmktError(what, root / side / name, line, AGAIN)
    return DataDirectory({u: str(root / path) for u, path in wav.items()}, utt2spk, text=text)


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets from the folder speechocean762."""
    data, test = read_side(root, "train"), read_side(root, "test")
    parts = split_groups(data.utt2spk, {"valid": 0.1, "train": 1})
    return {**{name: select(data, parts[name]) for name in ("train", "valid")}, "test": test}


if __name__ == "__main__":
    description = __doc__.splitlines()[0]
    sys.exit(run_recipe(CORPUS, read_sets, description, needed=lambda args: ["speechocean762"]))
