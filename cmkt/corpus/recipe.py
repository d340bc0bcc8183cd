"""Stage 1 of a recipe: find the corpus, read its sets, write Kaldi data directories.

A recipe's `local/prepare.py` says what must be known of the corpus (`Corpus`) and reads its sets;
options, download, search for the folder, errors and restarting are the same for all and lie here.
"""

import argparse
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import soundfile

from cmkt.corpus.datadir import DataDirectory
from cmkt.errors import CmktError, run_command
from cmkt.parallel import parallel_map
from cmkt.stage import Stage, atomic_file


@dataclass(frozen=True)
class Corpus:
    """What stage 1 must know of a corpus.

    Args:
        name: what people call it.
        source: where it comes from, and its licence.
        tree: the files and folders that are expected, for messages.
        landmark: a pattern relative to the corpus folder that something must match, such as
            `wav/train`: it tells the folder from those above and below it; `**` takes any.
        archives: table of what can be downloaded (see `cmkt.corpus.download`); None where the
            licence or the owner does not allow it.
    """

    name: str
    source: str
    tree: str
    landmark: str
    archives: Path | None = None


@dataclass(frozen=True)
class Segment:
    """An utterance that stage 1 must write to a file of its own, because no file holds just it.

    Args:
        path: the recording.
        start: where the utterance begins, in seconds.
        end: where it ends, in seconds; None takes all of the rest.
        raw: what `soundfile.read` must be told of a file without a header, for example
            `(("samplerate", 16000), ("channels", 1), ("subtype", "PCM_16"), ("endian", "BIG"))`.
    """

    path: str
    start: float = 0.0
    end: float | None = None
    raw: tuple[tuple[str, object], ...] = ()


class NoCorpus(CmktError):
    """The corpus is not where it should be; the expected tree is printed after the message."""


def find_root(corpus_dir: str, corpus: Corpus) -> Path:
    """Find the corpus folder, also when the path given is a level or two too deep or too shallow.

    Raises:
        NoCorpus: no path, no such folder, or nothing there that looks like the corpus.
    """
    if not corpus_dir:
        raise NoCorpus(f"where is {corpus.name}?", remedy="give --corpus_dir")
    given = Path(corpus_dir).resolve()
    if not given.is_dir():
        raise NoCorpus("no such corpus folder", given, remedy="correct --corpus_dir")
    below = [[given], sorted(filter(Path.is_dir, given.glob("*")))]
    below.append(sorted(filter(Path.is_dir, given.glob("*/*"))))
    for level in (*below, *([parent] for parent in given.parents[:3])):
        found = [folder for folder in level if next(folder.glob(corpus.landmark), None)]
        if len(found) > 1:
            names = ", ".join(map(str, found))
            raise NoCorpus(f"several copies of {corpus.name}: {names}", remedy="give one of them")
        if found:
            if found[0] != given:
                print(f"{corpus.name} found in {found[0]}")
            return found[0]
    raise NoCorpus(f"not {corpus.name}: nothing matches {corpus.landmark} in it", given)


def run_recipe(
    corpus: Corpus,
    read_sets: Callable[[Path, argparse.Namespace], dict[str, DataDirectory]],
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    needed: Callable[[argparse.Namespace], list[str]] = lambda args: [],
) -> int:
    """Run `local/data.sh` of a recipe.

    Args:
        corpus: what must be known of it.
        read_sets: (corpus folder, options) -> {name of a set: its data}. A value of `wav` is a
            path or a `Segment`. Nothing is written before all sets are read.
        description: for `--help`.
        add_arguments: adds the recipe's own options.
        needed: options -> names of the archives to download, of `corpus.archives`.

    Returns:
        the exit status: 0, 1 for a named error; argparse exits with 2 for a wrong command line.
    """
    parser = argparse.ArgumentParser(
        prog="local/data.sh",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--corpus_dir", default="", help=f"{corpus.name} as it lies on disk")
    parser.add_argument("--data_dir", type=Path, default="data", help="(default %(default)s)")
    parser.add_argument("--download_dir", help="download the corpus to this folder first")
    parser.add_argument("--lang", choices=("en", "zh"), help="language of the corpus")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--nj", type=int, default=2, help="parallel jobs (default %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()

    def prepare() -> None:
        try:
            corpus_dir = args.corpus_dir
            if args.download_dir:
                corpus_dir = _download(corpus, needed(args), args.download_dir)
            sets = read_sets(find_root(corpus_dir, corpus), args)
            _check_sets(sets, corpus)
        except NoCorpus as error:
            error.more = f"{corpus.name}: {corpus.source}. Expected:\n{corpus.tree}"
            raise
        for name, data in sets.items():
            write_set(args.data_dir / name, data, args.nj)

    return run_command("local/data.sh", prepare)


def _download(corpus: Corpus, names: list[str], folder: str) -> str:
    if corpus.archives is None:
        raise NoCorpus(f"{corpus.name} cannot be downloaded by a script", remedy=corpus.source)
    from cmkt.corpus.download import download

    download(corpus.archives, names, Path(folder))
    return folder


def _check_sets(sets: dict[str, DataDirectory], corpus: Corpus) -> None:
    """Refuse sets without utterances, and utterances in two sets."""
    home: dict[str, str] = {}
    for name, data in sets.items():
        if not data.wav:
            raise NoCorpus(f"no utterances for the set {name}", remedy=f"is {corpus.name} whole?")
        for utterance in data.wav:
            if utterance in home:
                raise CmktError(f"utterance {utterance} is in {home[utterance]} and in {name}")
            home[utterance] = name


def _state(value: str | Segment) -> object:
    path = value.path if isinstance(value, Segment) else value
    # A pipe is no path, and may be too long for one.
    known = not path.endswith("|") and Path(path).is_file()
    return [repr(value), Path(path).stat().st_size if known else None]


def write_set(folder: Path, data: DataDirectory, nj: int = 1) -> None:
    """Write one data directory; does nothing if it is up to date.

    Args:
        folder: what to make, such as `data/train`.
        data: its tables; the file of each `Segment` is written to `folder/audio` as FLAC.
        nj: parallel jobs.

    Raises:
        CmktError: a recording of a segment cannot be read.
    """
    tables = [data.utt2spk, data.text, data.extra, {u: _state(v) for u, v in data.wav.items()}]
    tables.append({u: _state(v) for u, v in (data.spk1 or {}).items()})
    listing = hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()
    stage = Stage(folder, [], {"listing": listing, "folder": str(folder)})
    if not stage.is_done():
        with stage.working_directory() as work:
            written = {}
            for name, table in (("audio", data.wav), ("spk1", data.spk1 or {})):
                pieces = {u: v for u, v in table.items() if isinstance(v, Segment)}
                jobs = [(work / name / f"{u}.flac", piece) for u, piece in pieces.items()]
                if jobs:
                    (work / name).mkdir(exist_ok=True)
                    list(parallel_map(_write_segment, jobs, nj, f"{folder.name} {name}"))
                paths = {u: str(folder.absolute() / name / f"{u}.flac") for u in pieces}
                written[name] = {**table, **paths}
            spk1 = written["spk1"] if data.spk1 is not None else None
            replace(data, wav=written["audio"], spk1=spk1).write(work)
    print(f"{folder}: {len(data.wav)} utterances, {len(data.text)} with a transcript")


def _write_segment(job: tuple[Path, Segment]) -> None:
    path, segment = job
    if path.exists():
        return
    try:
        if segment.raw:
            raw = {"format": "RAW", **dict(segment.raw)}
            audio, rate = soundfile.read(segment.path, dtype="int16", **raw)
        else:
            rate = soundfile.info(segment.path).samplerate
            stop = None if segment.end is None else round(segment.end * rate)
            start = round(segment.start * rate)
            audio, _ = soundfile.read(segment.path, start=start, stop=stop, dtype="int16")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        remedy = "replace the file or drop its line"
        raise CmktError(f"not readable as audio: {error}", segment.path, remedy=remedy) from error
    # Through memory: libsndfile would hide that the device is full.
    encoded = io.BytesIO()
    soundfile.write(encoded, audio, rate, format="FLAC", subtype="PCM_16")
    with atomic_file(path, "wb") as stream:
        stream.write(encoded.getvalue())
