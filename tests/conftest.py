"""Small real inputs that several tests share: mixtures of `cmkt mix` and a linguistic store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.linguistic.store import StoreWriter, finish_store
from cmkt.stage import Stage

RATE = 16000
REPOSITORY = Path(__file__).resolve().parent.parent


def speech_like(generator: np.random.Generator, seconds: float) -> np.ndarray:
    """Return harmonics with a syllable-like envelope: sound and silence, as in speech."""
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = generator.uniform(100, 220)
    voice = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12))
    envelope = np.clip(np.sin(2 * np.pi * generator.uniform(2, 4) * time), 0, None)
    return (0.05 * voice * envelope).astype(np.float32)


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory) -> Path:
    """`dump/audio/{train,valid}` of eight and four utterances, made by the real mixer."""
    root = tmp_path_factory.mktemp("mixtures")
    generator = np.random.default_rng(0)
    (root / "noise").mkdir()
    for name in ("a", "b"):
        noise = generator.normal(0, 0.1, 4 * RATE)
        soundfile.write(root / "noise" / f"{name}.wav", noise, RATE)
    for name, count in (("train", 8), ("valid", 4)):
        folder = root / "data" / name
        (folder / "audio").mkdir(parents=True)
        wav = {}
        for number in range(count):
            path = folder / "audio" / f"{name}{number}.wav"
            soundfile.write(path, speech_like(generator, 1 + 0.1 * number), RATE)
            wav[f"{name}{number}"] = str(path)
        # The last utterance has no transcript.
        text = {utterance: f"words of {utterance}" for utterance in list(wav)[:-1]}
        DataDirectory(wav, dict.fromkeys(wav, "speaker"), text=text).write(folder)
        arguments = ["mix", "--data_dir", str(folder), "--noise_dir", str(root / "noise")]
        arguments += ["--output_dir", str(root / "audio" / name), "--snr=0:5", "--nj", "1"]
        assert main(arguments) == 0
    return root


@pytest.fixture(scope="session")
def stores(mixtures) -> Path:
    """`dump/llm/toy/{train,valid}`: random token embeddings of width 6 for those with a text."""
    root = mixtures / "llm" / "toy"
    generator = np.random.default_rng(1)
    for name in ("train", "valid"):
        stage = Stage(root / name, [mixtures / "audio" / name], {"model": "toy"})
        with stage.working_directory() as work:
            text = read_table(mixtures / "audio" / name / "text")
            with StoreWriter(work, 1, "float32") as writer:
                for utterance, line in text.items():
                    matrix = generator.normal(size=(len(line.split()) + 1, 6))
                    writer.write({utterance: (f"{line} .", matrix)}, {})
            meta = {"model": "toy", "revision": None, "layer": -1}
            finish_store(work, root / name, {u: u for u in text}, text, meta)
    return root


@pytest.fixture(scope="session")
def statistics(mixtures) -> Path:
    """`exp/stats` of the mixtures, collected by `cmkt train`."""
    output = mixtures / "stats"
    assert main(["train", "--collect_stats", "true", "--output_dir", str(output),
                 *data_options(mixtures)]) == 0  # fmt: skip
    return output


def data_options(mixtures: Path) -> list[str]:
    """Return the data options of `cmkt train` for the shared mixtures."""
    audio = mixtures / "audio"
    return ["--train_dir", str(audio / "train"), "--valid_dir", str(audio / "valid")]


def tiny_config(separator: str = "rnn", **changes) -> dict:
    """Return a training configuration that runs in a second."""
    sizes = {
        "rnn": {"num_spk": 1, "layer": 1, "unit": 8},
        "tcn": {"num_spk": 1, "layer": 2, "stack": 1, "bottleneck_dim": 8, "hidden_dim": 8},
    }
    config = {
        "encoder": "stft",
        "encoder_conf": {"n_fft": 128, "hop_length": 64},
        "decoder": "stft",
        "decoder_conf": {"n_fft": 128, "hop_length": 64},
        "separator": separator,
        "separator_conf": sizes[separator],
        "criterions": [
            {"name": "l1_fd", "conf": {}, "wrapper": "fixed_order", "wrapper_conf": {"weight": 1.0}}
        ],
        "iterator_type": "sequence",
        "batch_type": "folded",
        "fold_length": [80000],
        "batch_size": 4,
        "max_epoch": 2,
        "optim": "adam",
        "optim_conf": {"lr": 0.01},
        "best_model_criterion": [["valid", "loss_se", "min"]],
        "keep_nbest_models": 2,
        "num_workers": 0,
        "num_att_plot": 0,
        "use_matplotlib": False,
    }
    return {**config, **changes}


def transfer_conf(**changes) -> dict:
    """Return the transfer keys of a tiny training."""
    conf = {"alpha": 0.5, "alignment": {"width": 8, "heads": 2}, "misalignment": {"mode": "random"}}
    conf["misalignment"]["maximum"] = 1
    return {**conf, **changes}


def write_config(path: Path, config: dict) -> Path:
    """Write a training YAML (JSON is YAML)."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    return path


def run_command(cwd: Path, *command) -> subprocess.CompletedProcess:
    """Run a command of this environment in a folder, and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    command = [str(word) for word in command]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def prepare_corpus(recipe: str, cwd: Path, corpus_dir, *more) -> subprocess.CompletedProcess:
    """Run stage 1 of a recipe as run.sh does, in a folder of its own."""
    script = REPOSITORY / "egs" / recipe / "local" / "data.sh"
    options = ["--corpus_dir", corpus_dir, "--data_dir", "data", "--seed", "0", "--nj", "2"]
    return run_command(cwd, script, *options, *more)
