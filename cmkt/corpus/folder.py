"""Stage 1 for any folder of clean speech: finds audio, speakers and transcripts, makes the sets.

Audio lies at any depth. Folders named train and test (or tr, tt; valid, val, dev, cv) at the top
are the sets; what is missing of valid and test is a tenth of the training speakers each. The
speaker of a file is what --speaker_pattern finds in its path, else its folder at the top, or in
the set's folder; a file in no folder is a speaker of its own. A transcript is a text file of the
same name, .txt or .lab, in UTF-8.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import soundfile

from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.noise import SPLIT_FOLDERS
from cmkt.corpus.recipe import Corpus, NoCorpus, run_recipe
from cmkt.corpus.split import split_off
from cmkt.errors import CmktError
from cmkt.parallel import parallel_map

AUDIO = [".wav", ".flac", ".ogg", ".opus", ".sph", ".aiff", ".aif"]
if "MP3" in soundfile.available_formats():  # libsndfile 1.1 and later
    AUDIO.append(".mp3")
OTHER_AUDIO = {".mp3", ".m4a", ".mp4", ".aac", ".wma", ".amr", ".webm", ".raw"} - {*AUDIO}
TRANSCRIPTS = (".txt", ".lab")

CORPUS = Corpus(
    name="the speech folder",
    source="any folder of clean speech",
    tree="""\
    DIR/
        [train/ valid/ test/]     (optional: the sets)
            [<speaker>/]          (optional, with folders below as you like)
                <name>.wav        (or .flac, .ogg, .opus, .mp3, .sph, .aiff)
                <name>.txt        (optional: the transcript; or .lab)""",
    landmark="**",  # any folder will do
)


def walk(root: Path) -> Iterator[str]:
    """Yield the path of each file relative to a folder, sorted; hidden ones are left out."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder above would be walked for ever
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = os.path.relpath(folder, root)
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.normpath(os.path.join(below, name))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def find_audio(root: Path, names: list[str]) -> list[str]:
    """Return those of the files that are audio.

    Raises:
        CmktError: there is none, or a name cannot stand in a wav.scp.
    """
    audio = [name for name in names if _suffix(name) in AUDIO]
    counts = Counter(s for s in map(_suffix, names) if s in OTHER_AUDIO)
    others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    if not audio:
        what = f"no audio that can be read, but {others}" if others else "no audio in it"
        raise NoCorpus(what, root, remedy="convert it to flac" if others else "correct the path")
    if others:
        print(f"{root}: {others} files left out: convert them to flac")
    for name in audio:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(name).decode("utf-8", "replace")
            raise CmktError("file name is not UTF-8", root / shown, remedy="rename it") from error
        if "|" in name or "\n" in name:
            raise CmktError(f"file name {name!r} holds | or a line break", root, None, "rename it")
    return audio


def sort_into_sets(names: list[str]) -> tuple[dict[str, list[str]], int]:
    """Find the folders of the sets.

    Args:
        names: paths of the audio, relative to the corpus.

    Returns:
        {set: its paths}, `train` alone if there are no such folders; and how many folders at the
        start of each path name no speaker (they hold all the audio, or are those of the sets).
    """
    depth = 0
    while len({name.split("/")[depth] for name in names}) == 1 and all(
        name.count("/") > depth + 1 for name in names
    ):
        depth += 1  # one folder holds all

    side_of = {folder: side for side, folders in SPLIT_FOLDERS.items() for folder in folders}
    sides: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")[depth:]
        side = side_of.get(parts[0].lower(), "") if len(parts) > 1 else ""
        sides.setdefault(side, []).append(name)
    if not ("train" in sides and {"valid", "test"} & sides.keys()):
        return {"train": names}, depth
    outside = sides.pop("", [])
    if outside:
        print(f"{len(outside)} files lie in no folder of a set, unused, the first {outside[0]}")
    return sides, depth + 1


def read_utterances(
    root: Path, names: list[str], depth: int, pattern: re.Pattern | None
) -> DataDirectory:
    """Give utterance ids and speakers to audio files.

    An id is the speaker, then the rest of the path with `-` for `/` and `_` for blanks.

    Args:
        root: the corpus.
        names: paths relative to it.
        depth: how many folders at the start of each path name no speaker.
        pattern: its one group is the speaker, searched in the path; None: folders tell.

    Raises:
        CmktError: a path without a speaker, or two paths that would get the same id.
    """
    data = DataDirectory({}, {})
    for name in names:
        parts = os.path.splitext(name)[0].split("/")
        if pattern:
            found = pattern.search(name)
            if not found or not found[1]:
                remedy = f"it is searched in the path {name}"
                raise CmktError("--speaker_pattern finds no speaker", root / name, None, remedy)
            speaker = found[1].replace("/", "-")
        elif len(parts) > depth + 1:
            speaker = parts.pop(depth)
        else:
            speaker = ""
        # Always the speaker first, as Kaldi wants, even where the name starts with it, too.
        words = [speaker, *parts] if speaker else parts
        utterance = "_".join("-".join(words).split())
        if utterance in data.wav:
            what = f"would be the utterance {utterance}, as {data.wav[utterance]}"
            raise CmktError(what, root / name, remedy="rename or remove one of the two")
        data.wav[utterance] = str(root / name)
        data.utt2spk[utterance] = "_".join(speaker.split()) or utterance
    return data


def read_transcript(path: str) -> str:
    """Return the words of a text file, its lines joined.

    Raises:
        CmktError: not UTF-8; names the line.
    """
    raw = Path(path).read_bytes()
    try:
        return " ".join(raw.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CmktError("not UTF-8 text", path, line, "convert it with iconv") from error


def find_transcripts(root: Path, names: list[str], data: DataDirectory) -> dict[str, str]:
    """Find the text file of each utterance that has one: {utterance: path}.

    Raises:
        CmktError: two text files for one utterance.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        stem, suffix = os.path.splitext(str(root / name))
        if suffix.lower() in TRANSCRIPTS:
            found.setdefault(stem, []).append(str(root / name))
    texts = {}
    for utterance, path in data.wav.items():
        files = found.get(os.path.splitext(path)[0], [])
        if len(files) > 1:
            what = f"{utterance} has another transcript: {files[1]}"
            raise CmktError(what, files[0], remedy="remove one of the two")
        if files:
            texts[utterance] = files[0]
    return texts


def _say_who_speaks(sets: dict[str, DataDirectory], pattern: re.Pattern | None) -> None:
    speaker_of = {u: s for data in sets.values() for u, s in data.utt2spk.items()}
    alone = sum(utterance == speaker for utterance, speaker in speaker_of.items())
    speakers = sorted({s for u, s in speaker_of.items() if s != u})
    if speakers:
        some = ", ".join(speakers[:3]) + (", ..." if len(speakers) > 3 else "")
        source = "--speaker_pattern" if pattern else "their folders"
        print(f"{len(speakers)} speakers by {source}: {some}")
    if alone:
        print(f"{alone} files count as a speaker each (--speaker_pattern tells who speaks)")


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets from a folder of speech."""
    names = list(walk(root))
    sides, depth = sort_into_sets(find_audio(root, names))
    pattern = args.speaker_pattern
    sets = {side: read_utterances(root, part, depth, pattern) for side, part in sides.items()}
    _say_who_speaks(sets, pattern)
    found = 0
    for side, data in sets.items():
        texts = find_transcripts(root, names, data)
        if texts:
            words = parallel_map(read_transcript, list(texts.values()), args.nj, f"{side} texts")
            data.text = {u: line for u, line in zip(texts, words, strict=True) if line}
        found += len(texts)
    unused = sum(_suffix(name) in TRANSCRIPTS for name in names) - found
    if unused:
        print(f"{unused} text files have no audio file of their name in a set: unused")
    return split_off(sets, [name for name in ("test", "valid") if name not in sets], root)


def _speaker_pattern(text: str) -> re.Pattern:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from error
    if pattern.groups != 1:
        raise argparse.ArgumentTypeError("want one group, the speaker, as in '^([^_]+)_'")
    return pattern


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option that tells who speaks."""
    parser.add_argument(
        "--speaker_pattern",
        type=_speaker_pattern,
        metavar="REGEX",
        help="its one group is the speaker, searched in the path relative to the corpus, as in "
        "'([^/_]+)_[^/]*$' for anna_0001.wav",
    )


if __name__ == "__main__":
    sys.exit(run_recipe(CORPUS, read_sets, __doc__, add_arguments))
