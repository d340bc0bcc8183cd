"""Turn VoiceBank-DEMAND, as it unpacks, into Kaldi data directories of noisy and clean pairs.

Makes data/train, data/valid and data/test; utt2noise and utt2snr come from the corpus's log
files if these are there. Utterances without a transcript are kept.
"""

import argparse
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.recipe import Corpus, NoCorpus, run_recipe
from cmkt.corpus.split import select, split_groups
from cmkt.errors import CmktError

CORPUS = Corpus(
    name="VoiceBank-DEMAND",
    source="https://doi.org/10.7488/ds/2117, CC BY 4.0",
    tree="""\
    <folder>/
        noisy_trainset_28spk_wav/<speaker>_<number>.wav    (2.8 GB as an archive; 56spk: 5.6 GB)
        clean_trainset_28spk_wav/<speaker>_<number>.wav    (2.5 GB; 56spk: 4.8 GB)
        noisy_testset_wav/  clean_testset_wav/             (0.2 GB each)
        trainset_28spk_txt/<speaker>_<number>.txt  testset_txt/    (optional)
        log_trainset_28spk.txt  log_testset.txt                    (optional)""",
    landmark="noisy_t*set*_wav",
    archives=Path(__file__).resolve().parents[1] / "archives.yaml",
)
VALID_SPEAKERS = ("p226", "p287")  # of the 28, as in the recipes of ESPnet and SpeechBrain
VALID_SHARE = 0.04  # of the larger set, which has no such custom: two of its 58 speakers


def read_pairs(root: Path, side: str) -> DataDirectory:
    """Read one official set.

    Args:
        root: the folder that holds all.
        side: `trainset_28spk`, `trainset_56spk` or `testset`.

    Raises:
        CmktError: no such set, a file without its partner, or a text that cannot be read.
    """
    folders = {kind: root / f"{kind}_{side}_wav" for kind in ("noisy", "clean")}
    files = {}
    for kind, folder in folders.items():
        if not folder.is_dir():
            raise NoCorpus("no such folder", folder, remedy="unpack its archive there")
        files[kind] = {path.stem: str(path) for path in folder.glob("[!.]*.wav")}
    for kind, other in (("noisy", "clean"), ("clean", "noisy")):
        for utterance in sorted(files[kind].keys() - files[other].keys()):
            what = f"has no {other} partner in {folders[other]}"
            raise CmktError(what, files[kind][utterance], remedy="unpack both archives again")
    speakers = {utterance: utterance.split("_")[0] for utterance in files["noisy"]}
    data = DataDirectory(files["noisy"], speakers, files["clean"])
    for utterance in data.wav:
        words = read_words(root / f"{side}_txt" / f"{utterance}.txt")
        if words:
            data.text[utterance] = words
    data.extra = read_log(root / f"log_{side}.txt", data.wav)
    return data


def read_words(path: Path) -> str:
    """Return a transcript; empty if there is none."""
    if not path.is_file():
        return ""
    try:
        return " ".join(path.read_bytes().decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise CmktError("not UTF-8 text", path, 1, "convert it, for example with iconv") from error


def read_log(path: Path, utterances: dict) -> dict[str, dict[str, str]]:
    """Read what was mixed: the tables utt2noise and utt2snr; none if there is no log.

    Raises:
        CmktError: a line that is not `<utterance> <noise> <SNR>`, or an utterance without one.
    """
    if not path.is_file():
        return {}
    tables: dict[str, dict[str, str]] = {"utt2noise": {}, "utt2snr": {}}
    for line, raw in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not raw.strip():
            continue
        try:
            utterance, noise, snr = raw.split()
            snr = f"{float(snr):g}"
        except ValueError as error:
            raise CmktError("not `<utterance> <noise> <SNR>`", path, line, "correct it") from error
        if utterance in utterances:
            tables["utt2noise"][utterance], tables["utt2snr"][utterance] = noise, snr
    missing = sorted(set(utterances) - tables["utt2snr"].keys())
    if missing:
        raise CmktError(f"lacks utterance {missing[0]}", path, remedy="unpack logfiles.zip again")
    return tables


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets; validation holds training speakers out."""
    data, test = (read_pairs(root, side) for side in sides(args))
    if args.speakers == 28:
        valid = {u for u, speaker in data.utt2spk.items() if speaker in VALID_SPEAKERS}
    else:
        valid = split_groups(data.utt2spk, {"valid": VALID_SHARE, "train": 1})["valid"]
    train = data.wav.keys() - valid
    return {"train": select(data, train), "valid": select(data, valid), "test": test}


def sides(args: argparse.Namespace) -> tuple[str, str]:
    """Return the names that the corpus gives to its training set and its test set."""
    return f"trainset_{args.speakers}spk", "testset"


def needed(args: argparse.Namespace) -> list[str]:
    """Return the archives to download."""
    kinds = ("noisy_{}_wav", "clean_{}_wav", "{}_txt")
    return [*(kind.format(side) for side in sides(args) for kind in kinds), "logfiles"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the training set."""
    parser.add_argument(
        "--speakers",
        type=int,
        choices=(28, 56),
        default=28,
        help="training set: the customary one or the larger one (default %(default)s)",
    )


if __name__ == "__main__":
    description = __doc__.splitlines()[0]
    sys.exit(run_recipe(CORPUS, read_sets, description, add_arguments, needed))
