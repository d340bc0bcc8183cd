"""Turn AN4, as it unpacks, into Kaldi data directories.

Makes data/train, data/valid (a tenth of the training speakers) and data/test (the official one).
NIST sphere and wav files stay where they are; headerless ones are converted to FLAC.
"""

import argparse
import re
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.recipe import Corpus, Segment, run_recipe
from cmkt.corpus.split import select, split_groups
from cmkt.errors import CmktError

CORPUS = Corpus(
    name="AN4",
    source="Carnegie Mellon University, http://www.speech.cs.cmu.edu/databases/an4, "
    "free for any purpose under CMU's terms",
    tree="""\
    an4/
        wav/an4_clstk/<speaker>/<utterance>.sph      (training; or .raw, big-endian, or .wav)
        wav/an4test_clstk/<speaker>/<utterance>.sph
        etc/an4_train.transcription
        etc/an4_test.transcription""",
    landmark="wav/an4_clstk",
    archives=Path(__file__).resolve().parents[1] / "archives.yaml",
)
FOLDERS = {"train": "an4_clstk", "test": "an4test_clstk"}
HEADERLESS = (("samplerate", 16000), ("channels", 1), ("subtype", "PCM_16"), ("endian", "BIG"))
# `<s> YES </s> (an251-fash-b)` in the training file, `GO (an409-fcaw-b)` in the test file.
TRANSCRIPT = re.compile(r"(?:<s>)?\s*(?P<words>.*?)\s*(?:</s>)?\s*\((?P<utterance>\S+)\)")


def read_audio_names(folder: Path) -> DataDirectory:
    """Read utterances and speakers of one official side.

    Raises:
        CmktError: an utterance that comes twice, or a name that is not its speaker's.
    """
    data = DataDirectory({}, {})
    for path in sorted(folder.glob("*/*")):
        if path.suffix not in (".sph", ".raw", ".wav"):
            continue
        utterance, speaker = path.stem, path.parent.name
        if utterance in data.wav:
            raise CmktError(
                f"utterance {utterance} is there with another extension, too",
                path,
                remedy="keep the files of one format",
            )
        if utterance.split("-")[1:2] != [speaker]:
            raise CmktError(f"not an utterance of speaker {speaker}", path, remedy="move it")
        raw = path.suffix == ".raw"
        data.wav[utterance] = Segment(str(path), raw=HEADERLESS) if raw else str(path)
        data.utt2spk[utterance] = speaker
    return data


def read_transcripts(path: Path, utterances: dict) -> dict[str, str]:
    """Read a transcription file: {utterance: words}.

    Args:
        path: `an4_train.transcription` or `an4_test.transcription`.
        utterances: those whose audio is there.

    Raises:
        CmktError: no such file, not UTF-8, not in AN4's format, or without audio.
    """
    if not path.is_file():
        raise CmktError("no such transcription file", path, remedy="unpack the archive again")
    text = {}
    for line, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found = TRANSCRIPT.fullmatch(raw.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise CmktError("not UTF-8 text", path, line, "convert it with iconv") from error
        if not found:
            raise CmktError("not `<s> WORDS </s> (utterance)`", path, line, "correct the line")
        utterance = found["utterance"]
        if utterance not in utterances:
            what = f"no audio of utterance {utterance}"
            raise CmktError(what, path, line, "unpack the archive again or remove the line")
        if found["words"]:
            text[utterance] = found["words"]
    return text


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets from the folder an4."""
    sides = {}
    for side, folder in FOLDERS.items():
        data = sides[side] = read_audio_names(root / "wav" / folder)
        data.text = read_transcripts(root / "etc" / f"an4_{side}.transcription", data.wav)
    parts = split_groups(sides["train"].utt2spk, {"valid": 0.1, "train": 1})
    return {
        "train": select(sides["train"], parts["train"]),
        "valid": select(sides["train"], parts["valid"]),
        "test": sides["test"],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the archive."""
    parser.add_argument(
        "--archive",
        choices=("an4_sphere", "an4_raw"),
        default="an4_sphere",
        help="what to download (default %(default)s)",
    )


if __name__ == "__main__":
    description = __doc__.splitlines()[0]
    sys.exit(run_recipe(CORPUS, read_sets, description, add_arguments, lambda a: [a.archive]))
