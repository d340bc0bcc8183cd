"""`cmkt new-recipe`, and the commands of docs/new_corpus.md on a copy of the checkout."""

import io
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory, read_table

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "new_corpus.md"
RATE = 16000


def shell(command, cwd, home):
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`~/speech`, ten speakers with transcripts, and `~/noise`."""
    home = tmp_path_factory.mktemp("home")
    generator = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    for number in range(10):
        folder = home / "speech" / f"speaker{number}"
        folder.mkdir(parents=True)
        for take in range(2):
            pitch, rate = generator.uniform(100, 220), generator.uniform(2, 4)
            voice = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12))
            voice *= 0.05 * np.clip(np.sin(2 * np.pi * rate * time), 0, None)
            soundfile.write(folder / f"{take}.wav", voice, RATE)
            (folder / f"{take}.txt").write_text(f"sentence {take} of speaker {number}")
    for kind in ("street", "fan", "rain", "crowd", "train"):
        (home / "noise" / kind).mkdir(parents=True)
        soundfile.write(home / "noise" / kind / "1.wav", generator.normal(0, 0.1, RATE), RATE)
    return home


@pytest.fixture
def checkout(tmp_path):
    """What of the repository a recipe needs, without the outputs of other recipes."""
    for name in ("utils", "conf"):
        shutil.copytree(REPOSITORY / name, tmp_path / "checkout" / name)
    shutil.copy2(REPOSITORY / "run.sh", tmp_path / "checkout")
    (tmp_path / "checkout" / "egs").mkdir()
    return tmp_path / "checkout"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)


def test_commands_of_the_document_work(checkout, home):
    """All `bash` blocks, in order; the `sh` ones train or need data of others."""
    for command in blocks("bash"):
        done = shell(command, checkout, home)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for recipe in ("mine", "mine_too"):
        folder = checkout / "egs" / recipe
        sizes = {}
        for name in ("train", "valid", "test"):
            mixtures = DataDirectory.read(folder / "dump" / "audio" / name)
            sizes[name] = len(mixtures.wav)
            assert all((folder / path).is_file() for path in mixtures.wav.values())
        assert sizes == {"train": 16, "valid": 2, "test": 2}
    assert len(read_table(checkout / "egs/mine/dump/audio/train/text")) == 16


def test_code_of_the_document_is_that_of_the_reader(checkout, home, monkeypatch):
    monkeypatch.chdir(checkout)
    speech = str(home / "speech")
    assert main(["new-recipe", "mine", "--kind", "python", "--speech_dir", speech]) == 0
    reader = (checkout / "egs" / "mine" / "local" / "prepare.py").read_text()
    pieces = blocks("python")
    assert len(pieces) == 3 and all(piece in reader for piece in pieces)
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, "--config", REPOSITORY / "pyproject.toml"]
        done = subprocess.run([*ruff, checkout / "egs"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def new_recipe(checkout, monkeypatch, *words):
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return main(["new-recipe", *map(str, words)])


@pytest.mark.parametrize("kind", ["folder", "kaldi", "python"])
def test_recipe_is_whole_and_the_command_line_wins(checkout, home, monkeypatch, capsys, kind):
    (checkout / "deeper").mkdir()
    options = ["--noise_dir", home / "noise", "--kind", kind, "--fs", "8000", "--lang", "zh"]
    options += ["--speech_dir", home / "speech", "--description", "Own  data."]
    assert new_recipe(checkout / "deeper", monkeypatch, "mine_2", *options) == 0
    assert "../egs/mine_2/run.sh --stop_stage 2" in capsys.readouterr().out
    folder = checkout / "egs" / "mine_2"
    assert os.access(folder / "run.sh", os.X_OK) and os.access(folder / "local/data.sh", os.X_OK)
    readme = (folder / "README.md").read_text()
    assert "Own data." in readme and str(home / "speech") in readme and "@" not in readme
    plan = shell("egs/mine_2/run.sh --dry_run --corpus_dir '/other place'", checkout, home)
    assert plan.returncode == 0, plan.stderr
    for words in ("--corpus_dir /other place", f"--noise_dir {home}/noise", "--fs 8000",
                  "own_character.yaml", "cmkt report"):  # fmt: skip
        assert words in plan.stdout
    assert plan.stdout.splitlines()[1].endswith("--lang zh")
    assert [path.name for path in (checkout / "egs").iterdir()] == ["mine_2"]


def test_speech_folder_with_blanks(checkout, home, monkeypatch, tmp_path):
    (tmp_path / "my speech's").symlink_to(home / "speech")
    options = ["--speech_dir", tmp_path / "my speech's", "--noise_dir", home / "noise"]
    assert new_recipe(checkout, monkeypatch, "mine", *options) == 0
    plan = shell("egs/mine/run.sh --dry_run", checkout, home)
    assert plan.returncode == 0 and f"--corpus_dir {home}/speech" in plan.stdout


@pytest.mark.parametrize(
    "words, what",
    [
        (["Mine", "--speech_dir", "."], "NAME 'Mine'"),
        (["../mine", "--speech_dir", "."], "NAME '../mine'"),
        (["mine"], "give --speech_dir"),
        (["mine", "--speech_dir", "."], "give --noise_dir"),
        (["mine", "--speech_dir", "none"], "--speech_dir 'none': no such folder"),
        (["mine", "--speech_dir", ".", "--kind", "matlab"], "want one of folder, kaldi, python"),
        (["mine", "--speech_dir", "conf", "--noise_dir", "utils", "--fs", "16k"], "--fs '16k'"),
        (["mine", "--speech_dir", ".", "--noise_dir", "utils"], "lies in the speech folder"),
        (["mine", "--egs_dir", "conf/llm"], "no run.sh beside it"),
    ],
)
def test_what_is_missing_or_wrong_is_named_and_nothing_written(
    checkout, monkeypatch, capsys, words, what
):
    assert new_recipe(checkout, monkeypatch, *words) == 1
    assert what in capsys.readouterr().err
    assert not list((checkout / "egs").iterdir())


def test_nothing_is_overwritten_and_a_checkout_is_needed(
    checkout, home, monkeypatch, capsys, tmp_path
):
    options = ["--kind", "kaldi", "--speech_dir", home / "speech"]
    assert new_recipe(checkout, monkeypatch, "mine", *options) == 0
    (checkout / "egs" / "mine" / "run.sh").write_text("edited")
    assert new_recipe(checkout, monkeypatch, "mine", *options) == 1
    assert "egs/mine: exists already" in capsys.readouterr().err
    assert (checkout / "egs" / "mine" / "run.sh").read_text() == "edited"
    assert new_recipe(tmp_path, monkeypatch, "mine", *options) == 1
    assert "give --egs_dir" in capsys.readouterr().err


def test_dialogue_in_a_terminal_asks_for_what_is_missing(checkout, home):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "cmkt.cli", "new-recipe", "asked", "--fs", "8000"]
    answers = ["", "~/speech", "~/noise", "zh", "Our own."]  # kind, folders, language, description
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    done = subprocess.run(
        command,
        cwd=checkout,
        stdin=theirs,
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert "Language (en, zh) [en]: " in done.stdout and "Sampling" not in done.stdout
    settings = (checkout / "egs" / "asked" / "run.sh").read_text()
    assert f"--noise_dir {home}/noise" in settings and "--fs 8000" in settings
    assert "own_character" in settings
    assert "Our own." in (checkout / "egs" / "asked" / "README.md").read_text()
