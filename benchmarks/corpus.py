"""Measure `cmkt mix`, `cmkt validate` and on-the-fly mixing, each beside its rival in one run.

    python benchmarks/corpus.py [--only speed|online|large] [--speech_dir DIR --noise_dir DIR]

speed   real-time factors of one process on FLAC: mixing against a plain loop (read, crop, scale
        by the mean power, write), validating against reading and hashing alone
online  seconds per step of the egs/mini BLSTM, mixtures drawn on the fly and from files in turns
large   time and peak memory of the largest process at 300 000 utterances

Without --speech_dir the speech is synthetic (harmonics with a syllabic envelope, a little noise).
"""

import argparse
import hashlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from cmkt.corpus.datadir import DataDirectory

REPOSITORY = Path(__file__).resolve().parent.parent
RATE = 16000


def speech(generator: np.random.Generator, seconds: float) -> np.ndarray:
    moments = np.arange(int(seconds * RATE)) / RATE
    pitch = generator.uniform(100, 220)
    voice = sum(np.sin(2 * np.pi * pitch * k * moments) / k for k in range(1, 12))
    envelope = np.clip(np.sin(2 * np.pi * generator.uniform(2, 4) * moments), 0, None)
    return 0.05 * voice * envelope + generator.normal(0, 1e-3, len(moments))


def make_files(folder: Path, count: int, seconds: float, noise: bool = False) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        samples = generator.normal(0, 0.1, int(seconds * RATE)) if noise else None
        samples = speech(generator, seconds) if samples is None else samples
        soundfile.write(folder / f"{number:05d}.flac", samples, RATE)


def data_directory(files: list[Path], folder: Path) -> float:
    """Write a data directory of files; return their hours."""
    folder.mkdir(parents=True, exist_ok=True)
    wav = {f"utt{number:06d}": str(path) for number, path in enumerate(sorted(files))}
    DataDirectory(wav, {name: name[:8] for name in wav}).write(folder)
    return sum(soundfile.info(path).duration for path in files)


def cmkt(*words: object) -> tuple[float, float]:
    """Run a verb in a process of its own; return its seconds and peak memory in GB."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "cmkt.cli", *map(str, words)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{command}\n{log.read().decode()[-3000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def plain_mixing(files: list[Path], noise: list[Path], output: Path) -> float:
    """Mix as a short script would: everything read whole, levels by the mean power."""
    output.mkdir()
    generator = np.random.default_rng(0)
    start = time.perf_counter()
    for path in files:
        clean, _ = soundfile.read(path)
        sound, _ = soundfile.read(noise[generator.integers(len(noise))])
        sound = np.resize(sound, len(clean))
        scale = np.sqrt(np.mean(clean**2) / max(np.mean(sound**2), 1e-9)) / 10 ** (
            generator.uniform(-5, 10) / 20
        )
        soundfile.write(output / f"{path.stem}.wav", clean + scale * sound, RATE)
        soundfile.write(output / f"{path.stem}_clean.wav", clean, RATE)
    return time.perf_counter() - start


def plain_reading(files: list[Path]) -> float:
    start = time.perf_counter()
    for path in files:
        samples, _ = soundfile.read(path, dtype="int16")
        hashlib.blake2b(samples.tobytes()).digest()
    return time.perf_counter() - start


def speed(work: Path, speech_dir: Path, noise_dir: Path) -> None:
    files, noise = sorted(speech_dir.rglob("*.flac")), sorted(noise_dir.rglob("*.flac"))
    seconds = data_directory(files, work / "data")
    startup = min(cmkt("mix", "--help")[0] for _ in range(3))
    print(f"{len(files)} FLAC files, {seconds / 60:.1f} min; starting a verb takes {startup:.2f} s")
    for turn in range(2):
        mixing = ["--noise_dir", noise_dir, "--output_dir", work / f"mix{turn}"]
        checking = ["--output_dir", work / f"validation{turn}"]
        rows = {
            "cmkt mix": cmkt("mix", "--data_dir", work / "data", *mixing, "--nj", 1)[0],
            "a plain loop": plain_mixing(files, noise, work / f"plain{turn}"),
            "cmkt validate": cmkt("validate", work / "data", *checking, "--nj", 1)[0],
            "reading and hashing": plain_reading(files),
        }  # fmt: skip
        for name, taken in rows.items():
            print(f"  {name:<22}{taken:7.2f} s, {seconds / taken:6.0f} times real time")


def online(work: Path, speech_dir: Path, noise_dir: Path) -> None:
    files = sorted(speech_dir.rglob("*.flac"))[:320]
    data_directory(files, work / "data")
    data_directory(files[:8], work / "valid")
    shared = ["--noise_dir", noise_dir, "--nj", 2]
    cmkt("mix", "--data_dir", work / "valid", *shared, "--output_dir", work / "dump/valid")
    runs = {"from files": [], "on the fly": []}
    for kind, more in (("from files", []), ("on the fly", ["--online"])):
        folder = work / "dump" / kind.replace(" ", "_")
        cmkt("mix", "--data_dir", work / "data", *shared, "--output_dir", folder, *more)
        dirs = ["--train_dir", folder, "--valid_dir", work / "dump/valid"]
        cmkt("train", "--collect_stats", "true", *dirs, "--output_dir", f"{folder}_stats")
    for turn in range(5):
        for kind, times in runs.items():
            folder = work / "dump" / kind.replace(" ", "_")
            output = work / f"exp_{folder.name}_{turn}"
            mixing = ["--mixing_config", REPOSITORY / "conf/mixing/noise.yaml"]
            cmkt("train", "--config", REPOSITORY / "egs/mini/conf/train_blstm.yaml", "--train_dir",
                 folder, "--valid_dir", work / "dump/valid", "--stats_dir", f"{folder}_stats",
                 "--output_dir", output, "--max_epoch", 1, "--num_workers", 1,
                 *(mixing if kind == "on the fly" else []))  # fmt: skip
            log = (output / "train.log").read_text()
            times.append(float(re.search(r"epoch results:.*?train_time=([\d.e-]+)", log)[1]))
    medians = {kind: statistics.median(times) for kind, times in runs.items()}
    for kind, median in medians.items():
        print(f"  step with mixtures {kind}: {median:.3f} s (median of {len(runs[kind])})")
    print(f"  ratio {medians['on the fly'] / medians['from files']:.3f}")


def large(work: Path, count: int = 300_000) -> None:
    (work / "speech").mkdir()
    generator = np.random.default_rng(0)
    wav, template = {}, speech(generator, 0.4)
    for number in range(count):
        name = f"spk{number % 2000:04d}-{number:06d}"
        wav[name] = str(work / "speech" / f"{name}.wav")
        samples = np.roll(template, number % 6400) + generator.normal(0, 1e-3, len(template))
        soundfile.write(wav[name], samples, RATE)
    text = dict.fromkeys(wav, "some words that were said")
    (work / "data").mkdir()
    DataDirectory(wav, {name: name[:7] for name in wav}, text=text).write(work / "data")
    make_files(work / "noise", 10, 5, noise=True)
    mixing = ["--data_dir", work / "data", "--noise_dir", work / "noise"]
    for name, words in (
        ("validate", [work / "data", "--output_dir", work / "validation"]),
        ("mix", [*mixing, "--output_dir", work / "out"]),
    ):
        taken, memory = cmkt(name, *words, "--nj", 2)
        print(f"  cmkt {name}, {count} utterances: {taken:.0f} s, {memory:.2f} GB")


def main() -> None:
    """Run what --only names, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["speed", "online", "large"])
    parser.add_argument("--speech_dir", type=Path)
    parser.add_argument("--noise_dir", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    root = Path(tempfile.mkdtemp())
    try:
        speech_dir, noise_dir = args.speech_dir, args.noise_dir
        if speech_dir is None:
            make_files(root / "speech", 320, 6)
            speech_dir = root / "speech"
        if noise_dir is None:
            make_files(root / "noise", 20, 10, noise=True)
            noise_dir = root / "noise"
        for name, run in (("speed", speed), ("online", online)):
            if args.only in (None, name):
                print(name, flush=True)
                (root / name).mkdir()
                run(root / name, speech_dir.absolute(), noise_dir.absolute())
        if args.only in (None, "large"):
            print("large", flush=True)
            (root / "large").mkdir()
            large(root / "large")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
