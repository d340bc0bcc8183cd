"""Make the embedded corpus: synthesised English or Mandarin speech and generated noise.

Writes data/{train,valid,test}, Kaldi data directories of clean speech at 16 kHz with word times
(`ctm`), and data/noise/{train,valid,test}. Voices, sentences and noise recordings are disjoint
between the sets; the noise families machine and wind are in test only. The same seed gives the
same samples, whatever --nj.
"""

import argparse
import hashlib
import importlib.metadata
import io
import logging
import sys
from pathlib import Path

import numpy as np
import soundfile
from espeak import RATE, Voice, require_espeak, synthesise, synthesise_words
from noises import BABBLE, FAMILIES, MAKERS
from sentences import GRAMMARS, split_sentences
from voices import speakers

from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.noise import fit_length
from cmkt.corpus.word_times import CTM, read_word_times, write_word_times
from cmkt.errors import CmktError, run_command
from cmkt.parallel import parallel_map
from cmkt.stage import Stage, atomic_file

SETS = ("train", "valid", "test")
LEVELS = (-32.0, -20.0)  # dB of full scale, RMS of an utterance
PEAK = 0.9  # of full scale, at most
NOISE_LEVEL = 0.05  # RMS; mixing sets the level that counts
RECORDING = 20  # seconds
BABBLE_SENTENCES = 10  # that each voice of a babble recording says
SOURCES = sorted(Path(__file__).parent.glob("*.py"))  # the samples depend on every line of them


def generator_for(seed: int, name: str) -> np.random.Generator:
    """Return a random generator that depends on the seed and a name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def write_audio(path: Path, samples: np.ndarray, level: float) -> None:
    """Write 16-bit FLAC at an RMS level, lower where the peak would pass `PEAK`."""
    samples = samples * min(level / np.sqrt(np.mean(samples**2)), PEAK / np.abs(samples).max())
    # Through memory: libsndfile would hide that the device is full.
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, RATE, format="FLAC", subtype="PCM_16")
    with atomic_file(path, "wb") as stream:
        stream.write(encoded.getvalue())


def make_utterance(job: tuple[Path, str, Voice, int]) -> None:
    """Synthesise one utterance, at a level of its own, and note its word times beside it."""
    path, text, voice, seed = job
    level = 10 ** (generator_for(seed, path.stem).uniform(*LEVELS) / 20)
    samples, words = synthesise_words(text, voice)
    write_word_times(path.with_suffix(".ctm"), {path.stem: words})
    write_audio(path, samples, level)  # last: an utterance with audio is not made again


def make_recording(job: tuple[Path, str, str, list[str], dict]) -> None:
    """Make one recording of a noise family."""
    path, name, family, sentences, options = job
    generator, count = generator_for(options["seed"], path.stem), RECORDING * RATE
    if family == "babble":
        samples = babble(generator, count, name, sentences, options["lang"])
    else:
        samples = MAKERS[family](generator, count)
    write_audio(path, samples - samples.mean(), NOISE_LEVEL)


def babble(
    generator: np.random.Generator, count: int, name: str, sentences: list[str], lang: str
) -> np.ndarray:
    """Lay voices over each other that are no speakers of the set, each with its own order."""
    talkers, spread = BABBLE[name]
    voices = speakers(lang)["babble_test" if name == "test" else "babble_train"]
    total = np.zeros(count)
    for chosen in generator.choice(len(voices), talkers, replace=False):
        text = ", ".join(sentences[i] for i in generator.permutation(len(sentences)))
        speech = synthesise(text, voices[chosen])
        gain = 10 ** (-generator.uniform(0, spread) / 20) / speech.std()
        total += gain * fit_length(speech, count, RATE, generator.random())
    return total


def make_missing(function, jobs: list[tuple], work: Path, nj: int, label: str) -> None:
    """Make the files that a killed run has not left; each job starts with its file."""
    for half_written in work.rglob(".*.tmp"):
        half_written.unlink()
    todo = [job for job in jobs if not job[0].exists()]
    for _ in parallel_map(function, todo, nj, label):
        pass


def make_set(name: str, sentences: list[str], folder: Path, options: dict, nj: int) -> None:
    """Make one data directory of clean speech."""
    stage = Stage(folder, SOURCES, {**options, "sentences": sentences})
    if stage.is_done():
        return
    with stage.working_directory() as work:
        (work / "audio").mkdir(exist_ok=True)
        data, jobs, voices = DataDirectory({}, {}), [], speakers(options["lang"])[name]
        for number, text in enumerate(sentences):
            voice = voices[number % len(voices)]
            utterance = f"{voice.name}-{number:05d}"
            data.wav[utterance] = f"{folder}/audio/{utterance}.flac"
            data.utt2spk[utterance], data.text[utterance] = voice.name, text
            jobs.append((work / "audio" / f"{utterance}.flac", text, voice, options["seed"]))
        make_missing(make_utterance, jobs, work, nj, f"speech {name}")
        notes = [job[0].with_suffix(".ctm") for job in jobs]
        if not (work / CTM).exists():
            said = [read_word_times(note) for note in notes]
            write_word_times(work / CTM, {u: words for one in said for u, words in one.items()})
        for note in notes:
            note.unlink(missing_ok=True)
        data.write(work)


def make_noise(
    name: str, sentences: list[str], folder: Path, minutes: float, options: dict, nj: int
) -> None:
    """Make the noise recordings of one set, equally many of each family."""
    families = FAMILIES[name]
    number = max(round(minutes * 60 / RECORDING / len(families)), 1)
    stage = Stage(folder, SOURCES, {**options, "sentences": sentences, "number": number})
    if stage.is_done():
        return
    with stage.working_directory() as work:
        # The set is in the name, hence in the random generator: no recording is in two sets.
        jobs = [
            (work / f"{family}-{name}-{n:02d}.flac", name, family, sentences, options)
            for n in range(number)
            for family in families
        ]
        make_missing(make_recording, jobs, work, nj, f"noise {name}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line, refusing sizes that make no corpus."""
    parser = argparse.ArgumentParser(
        prog="local/data.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--corpus_dir", default="", help="not used: this corpus is made, not read")
    parser.add_argument("--data_dir", type=Path, default="data", help="(default %(default)s)")
    parser.add_argument(
        "--lang", default="en", choices=list(GRAMMARS), help="language (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--nj", type=int, default=2, help="parallel jobs (default %(default)s)")
    for name, count in (("train", 900), ("valid", 60), ("test", 30)):
        parser.add_argument(
            f"--{name}_utterances", type=int, default=count, help="(default %(default)s)"
        )
    parser.add_argument(
        "--noise_minutes",
        type=float,
        default=8.0,
        help="of train; valid and test get half of it (default %(default)s)",
    )
    args = parser.parse_args()
    for name in ("nj", "noise_minutes", *(f"{name}_utterances" for name in SETS)):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} must be above 0")
    return args


def make_corpus(args: argparse.Namespace) -> None:
    """Make what is not there yet.

    Raises:
        CmktError: no synthesiser, or more utterances wanted than there are sentences.
    """
    require_espeak()
    # Training comes last: its size changes none of the other sets.
    counts = {name: getattr(args, f"{name}_utterances") for name in ("test", "valid")}
    counts.update({f"babble_{name}": BABBLE_SENTENCES for name in SETS})
    counts["train"] = args.train_utterances
    try:
        sentences = split_sentences(counts, args.seed, args.lang)
    except ValueError as error:
        raise CmktError(str(error), remedy="ask for fewer utterances") from error
    espeak = importlib.metadata.version("espeakng-loader")
    options = {"lang": args.lang, "seed": args.seed, "espeak": espeak}
    args.data_dir.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        make_set(name, sentences[name], args.data_dir / name, options, args.nj)
        minutes = args.noise_minutes / (1 if name == "train" else 2)
        folder = args.data_dir / "noise" / name
        make_noise(name, sentences[f"babble_{name}"], folder, minutes, options, args.nj)


def main() -> int:
    """Run the command line; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    return run_command("local/data.sh", lambda: make_corpus(args))


if __name__ == "__main__":
    sys.exit(main())
