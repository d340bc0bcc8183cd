"""Turn AISHELL-1, as it unpacks, into Kaldi data directories.

Makes data/train, data/valid (the official dev) and data/test. Utterances without a transcript
are kept: they train enhancement and have no line in `text`.
"""

import argparse
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.recipe import Corpus, run_recipe
from cmkt.errors import CmktError

TRANSCRIPT = "aishell_transcript_v0.8.txt"
CORPUS = Corpus(
    name="AISHELL-1",
    source="https://www.openslr.org/33, Apache-2.0",
    tree=f"""\
    data_aishell/
        wav/train/<speaker>/<utterance>.wav    (16 GB in all, 340 speakers)
        wav/dev/   wav/test/                   (40 and 20 speakers)
        transcript/{TRANSCRIPT}""",
    # The archives of speakers match, too, so that they are named when nobody has unpacked them.
    landmark="wav/**/S[0-9][0-9][0-9][0-9]*",
    archives=Path(__file__).resolve().parents[1] / "archives.yaml",
)
SETS = {"train": "train", "valid": "dev", "test": "test"}
SPEAKERS = {"train": 340, "valid": 40, "test": 20}


def read_transcripts(folder: Path) -> dict[str, str]:
    """Read the transcripts of all sets: {utterance: words}.

    Raises:
        CmktError: the file is missing or another version, not UTF-8, or has an utterance twice.
    """
    path = folder / TRANSCRIPT
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("*.txt"))) or "no transcript"
        what = f"want {TRANSCRIPT}, found {found}"
        raise CmktError(what, folder, remedy="take it out of data_aishell.tgz")
    text = {}
    for line, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            words = raw.decode("utf-8-sig").split(maxsplit=1)
        except UnicodeDecodeError as error:
            remedy = f"iconv -f GBK -t UTF-8 {TRANSCRIPT} > utf8.txt && mv utf8.txt {TRANSCRIPT}"
            raise CmktError("not UTF-8 text, perhaps GBK", path, line, remedy) from error
        if words and words[0] in text:
            raise CmktError(f"utterance {words[0]} comes twice", path, line, "remove one")
        if len(words) == 2:
            text[words[0]] = words[1]
    return text


def refuse_packed(folder: Path) -> None:
    """Refuse a corpus whose archives of single speakers have not been unpacked."""
    unpacked = {path.name for path in folder.glob("*/S*")}
    archives = sorted(folder.glob("*.tar.gz"))
    packed = [path for path in archives if path.name.removesuffix(".tar.gz") not in unpacked]
    if packed:
        remedy = f"cd {folder} && for f in *.tar.gz; do tar xzf $f; done"
        raise CmktError(f"{len(packed)} speakers are not unpacked", packed[0], remedy=remedy)


def read_set(folder: Path, text: dict[str, str]) -> DataDirectory:
    """Read one official set.

    Raises:
        CmktError: an utterance in the folder of another speaker.
    """
    data = DataDirectory({}, {})
    for path in sorted(folder.glob("*/[!.]*.wav")):
        utterance, speaker = path.stem, path.parent.name
        if speaker not in utterance:
            raise CmktError(f"not an utterance of speaker {speaker}", path, remedy="move it")
        data.wav[utterance], data.utt2spk[utterance] = str(path), speaker
        if utterance in text:
            data.text[utterance] = text[utterance]
    return data


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets from the folder data_aishell."""
    refuse_packed(root / "wav")
    text = read_transcripts(root / "transcript")
    sets = {name: read_set(root / "wav" / side, text) for name, side in SETS.items()}
    for name, data in sets.items():
        found = len(set(data.utt2spk.values()))
        if found < SPEAKERS[name]:
            print(f"note: {name} has {found} of AISHELL-1's {SPEAKERS[name]} speakers")
    unused = len(text) - sum(len(data.text) for data in sets.values())
    if unused:
        print(f"note: {unused} transcripts without audio are left out")
    return sets


if __name__ == "__main__":
    description = __doc__.splitlines()[0]
    sys.exit(run_recipe(CORPUS, read_sets, description, needed=lambda args: ["data_aishell"]))
