"""Make the embedded corpus: synthesised English speech and generated noise.

Writes data/{train,valid,test} (clean speech, 16 kHz) and data/noise/{train,valid,test}. Voices,
sentences and noise recordings are disjoint between the sets; the noise families `machine` and
`wind` are in test only. The same seed gives the same samples, whatever --nj.
"""

import argparse
import hashlib
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import soundfile
from espeak import RATE, Voice, require_espeak, synthesise
from noises import MAKERS, TEST_FAMILIES, TRAIN_FAMILIES
from sentences import split_sentences
from tqdm import tqdm
from voices import SPEAKERS

from cmkt.corpus.datadir import DataDirectory
from cmkt.errors import CmktError
from cmkt.stage import Stage

VERSION = 1  # raise it when the same options begin to give other samples
SETS = ("train", "valid", "test")


def generator_for(seed: int, name: str) -> np.random.Generator:
    """Return a random generator that depends on the seed and a name only."""
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
    )


def write_audio(path: Path, samples: np.ndarray) -> None:
    """Write 16-bit FLAC under its final name only when complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    soundfile.write(temporary, samples, RATE, subtype="PCM_16", format="FLAC")
    temporary.replace(path)


def speak(job: tuple[Path, str, Voice, int]) -> None:
    """Synthesise one utterance at a level of its own; runs in a process of its own."""
    path, text, voice, seed = job
    if path.exists():
        return
    samples = synthesise(text, voice)
    level = 10 ** (generator_for(seed, path.stem).uniform(-32, -22) / 20)
    samples *= level / np.sqrt(np.mean(samples**2))
    write_audio(path, samples * min(1.0, 0.95 / np.abs(samples).max()))


def babble(job: tuple[Path, list[str], list[Voice], int, int]) -> None:
    """Lay four voices over each other, one sentence after the other."""
    path, sentences, voices, seed, count = job
    if path.exists():
        return
    generator = generator_for(seed, path.stem)
    total = np.zeros(count)
    for voice in voices:
        # A long text, so that each voice speaks once in this process (see `synthesise`).
        speech = np.zeros(0)
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
            order = generator.permutation(len(sentences))
            text = ", ".join(sentences[i] for i in order)
            speech = pool.apply(synthesise, (text, voice))
        total += np.roll(np.resize(speech, count), generator.integers(count)) / speech.std()
    write_audio(path, total * 0.05 / total.std())


def family_noise(job: tuple[Path, str, int, int]) -> None:
    """Make one recording of a noise family."""
    path, family, seed, count = job
    if path.exists():
        return
    samples = MAKERS[family](generator_for(seed, path.stem), count, RATE)
    samples = samples - samples.mean()
    samples *= min(0.05 / samples.std(), 0.9 / np.abs(samples).max())
    write_audio(path, samples)


def in_fresh_processes(function, jobs: list, nj: int, label: str) -> None:
    """Run each job in a process that has done nothing before it."""
    with multiprocessing.get_context("fork").Pool(nj, maxtasksperchild=1) as pool:
        done = pool.imap_unordered(function, jobs, chunksize=1)
        for _ in tqdm(done, total=len(jobs), desc=label, unit="file"):
            pass


def make_set(name: str, sentences: list[str], folder: Path, seed: int, nj: int) -> None:
    """Make one data directory of clean speech."""
    stage = Stage(folder, [], {"sentences": sentences, "seed": seed, "version": VERSION})
    if stage.is_done():
        print(f"{folder}: up to date")
        return
    with stage.working_directory() as work:
        (work / "audio").mkdir(exist_ok=True)
        data, jobs = DataDirectory({}, {}), []
        for number, text in enumerate(sentences):
            voice = SPEAKERS[name][number % len(SPEAKERS[name])]
            utterance = f"{voice.name}-{number:05d}"
            data.wav[utterance] = f"{folder}/audio/{utterance}.flac"
            data.utt2spk[utterance], data.text[utterance] = voice.name, text
            jobs.append((work / "audio" / f"{utterance}.flac", text, voice, seed))
        in_fresh_processes(speak, jobs, nj, f"speech {name}")
        data.write(work)


def make_noise(name: str, sentences: list[str], folder: Path, minutes: float, seed: int, nj: int):
    """Make the noise recordings of one set, each 20 s long."""
    families = TEST_FAMILIES if name == "test" else TRAIN_FAMILIES
    voices = SPEAKERS["babble_test" if name == "test" else "babble_train"]
    count = 20 * RATE
    number = max(round(minutes * 60 / 20 / len(families)), 1)
    stage = Stage(
        folder, [], {"number": number, "seed": seed, "sentences": sentences, "version": VERSION}
    )
    if stage.is_done():
        print(f"{folder}: up to date")
        return
    with stage.working_directory() as work:
        # The set is in the name, hence in the seed: no recording is in two sets.
        paths = [(work / f"{f}-{name}-{n:02d}.flac", f) for f in families for n in range(number)]
        in_fresh_processes(
            family_noise, [(p, f, seed, count) for p, f in paths if f != "babble"], nj,
            f"noise {name}",
        )  # fmt: skip
        for path, family in paths:
            if family == "babble":
                babble((path, sentences, voices, seed, count))


def main() -> int:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus_dir", help="not used: this corpus is made, not read")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="default: data")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--nj", type=int, default=2, help="parallel processes (default: 2)")
    for name, count in (("train", 900), ("valid", 60), ("test", 24)):
        parser.add_argument(f"--{name}_utterances", type=int, default=count,
                            help=f"sentences in {name} (default: {count})")  # fmt: skip
    parser.add_argument("--noise_minutes", type=float, default=8.0,
                        help="noise per set (default: 8; valid and test: half)")  # fmt: skip
    args = parser.parse_args()
    try:
        require_espeak()
        counts = {name: getattr(args, f"{name}_utterances") for name in SETS}
        try:
            sentences = split_sentences({**counts, "babble": 12}, args.seed)
        except ValueError as error:
            raise CmktError(str(error), remedy="ask for fewer utterances") from error
        for name in SETS:
            make_set(name, sentences[name], args.data_dir / name, args.seed, args.nj)
            minutes = args.noise_minutes if name == "train" else args.noise_minutes / 2
            make_noise(name, sentences["babble"], args.data_dir / "noise" / name, minutes,
                       args.seed, args.nj)  # fmt: skip
    except CmktError as error:
        print(f"data.sh: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
