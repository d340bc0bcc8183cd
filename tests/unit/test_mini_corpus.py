"""The embedded corpus: disjoint sets, determinism, sane audio."""

import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

pytest.importorskip("espeakng_loader")
LOCAL = Path(__file__).resolve().parents[2] / "egs" / "mini" / "local"
sys.path.insert(0, str(LOCAL))

from noises import TEST_FAMILIES, TRAIN_FAMILIES  # noqa: E402
from sentences import split_sentences  # noqa: E402
from voices import SPEAKERS  # noqa: E402

from cmkt.corpus.datadir import DataDirectory  # noqa: E402


def make(folder, *options):
    command = [
        sys.executable,
        LOCAL / "synthesise.py",
        "--data_dir",
        folder,
        "--train_utterances",
        "6",
    ]
    command += ["--valid_utterances", "2", "--test_utterances", "2", "--noise_minutes", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.flac"))}


def test_voices_and_sentences_are_many_and_disjoint():
    voices = {name: {speaker.voice for speaker in group} for name, group in SPEAKERS.items()}
    assert len(voices["train"]) >= 12
    assert sum(map(len, voices.values())) == len(set().union(*voices.values()))
    split = split_sentences({"train": 900, "valid": 60, "test": 24}, seed=0)
    assert len(set(split["train"])) >= 800
    assert sum(map(len, split.values())) == len(set().union(*split.values()))
    assert set(TEST_FAMILIES) - set(TRAIN_FAMILIES) == {"machine", "wind"}


def test_same_seed_same_samples_whatever_the_jobs(tmp_path):
    one = make(tmp_path / "one", "--nj", "1")
    two = make(tmp_path / "two", "--nj", "2")
    other = make(tmp_path / "other", "--seed", "1")
    assert one == two
    assert one != other
    for name in one:
        audio, rate = soundfile.read(tmp_path / "one" / name)
        assert rate == 16000 and audio.ndim == 1
        assert 0.005 < abs(audio).max() < 0.99
    data = DataDirectory.read(tmp_path / "one" / "train")
    assert len(data.text) == len(data.wav) == 6
