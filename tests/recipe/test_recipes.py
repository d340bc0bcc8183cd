"""The recipes end to end at a small size, and what a second run does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the checkout, so that a run leaves the working tree as it was."""
    copy = tmp_path_factory.mktemp("copy") / "cmkt"
    made = [name + lang for name in ("data", "dump", "exp") for lang in ("", "_zh")]
    ignore = shutil.ignore_patterns(".git", *made, "__pycache__", "build", ".venv*")
    shutil.copytree(REPOSITORY, copy, ignore=ignore)
    return copy


def run(command, **environment):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": path, **environment}
    )
    return done


SMALL = [
    "--data_args", "--train_utterances 48 --valid_utterances 8 --test_utterances 2",
    "--train_args", "--max_epoch 2",
]  # fmt: skip


def test_mini_end_to_end_and_a_second_run_is_a_no_op(repository):
    done = run([repository / "run.sh", *SMALL])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    recipe = repository / "egs" / "mini"
    report = (recipe / "RESULTS.md").read_text()
    for words in ("noisy", "blstm", "blstm_cmkt_minilm", "PESQ", "ESTOI", "SI-SNR", "transfer_gap"):
        assert words in report
    assert list((recipe / "exp" / "report").glob("*.png"))
    # No module of the language-model side is needed from stage 6 on.
    poison = repository / "poison"
    poison.mkdir()
    (poison / "transformers.py").write_text("raise ImportError('transformers is not here')\n")
    shutil.rmtree(recipe / "exp" / "blstm_cmkt_minilm_seed0" / "export")
    shutil.rmtree(recipe / "exp" / "blstm_cmkt_minilm_seed0" / "enhanced")
    shutil.rmtree(recipe / "exp" / "blstm_cmkt_minilm_seed0" / "scores")
    again = run([repository / "run.sh", "--stage", "6", *SMALL], PYTHONPATH=str(poison))
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]

    def model_files():
        return {p: p.stat().st_mtime_ns for p in recipe.glob("**/*.p*") if "report" not in p.parts}

    before = model_files()
    second = run([repository / "run.sh", *SMALL])
    assert second.returncode == 0, second.stderr[-3000:]
    assert model_files() == before


def test_mini_with_rivals_and_another_alignment(repository):
    """Stage 4 trains the recogniser that a mimic loss asks for; the export has none of it."""
    configs = ["train_blstm_mimic", *(f"tuning/train_blstm_cmkt_{n}" for n in ("feedback", "ctc"))]
    config = " ".join(f"egs/mini/conf/{name}.yaml" for name in configs)
    done = run([repository / "run.sh", "--enh_config", config, *SMALL])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    recipe = repository / "egs" / "mini"
    assert (recipe / "exp" / "recogniser" / "meta.yaml").exists()
    exported = yaml.safe_load((recipe / "exp/blstm_mimic_seed0/export/config.yaml").read_text())
    assert [criterion["name"] for criterion in exported["criterions"]] == ["l1_fd"]
    report = (recipe / "RESULTS.md").read_text()
    assert "blstm_cmkt_feedback_minilm" in report and "retrieval, first" in report
    assert list((recipe / "exp" / "report").glob("attention_blstm_cmkt_ctc_minilm_seed0_*.png"))
    again = run([repository / "run.sh", "--stage", "4", "--enh_config", config, *SMALL])
    assert "exp/recogniser: up to date" in again.stdout


def test_mini_in_mandarin_with_a_language_model_of_its_own(repository, tmp_path):
    """Synthesised Mandarin, a character model trained on its transcripts: nothing is downloaded."""
    config = tmp_path / "own_character.yaml"
    text = (repository / "conf" / "llm" / "own_character.yaml").read_text()
    config.write_text(text.replace("max_steps: 2000", "max_steps: 200"))
    small = [word.replace("48", "80") for word in ("--lang", "zh", *SMALL)]
    small += ["--llm_config", str(config)]
    done = run([repository / "run.sh", *small])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    recipe = repository / "egs" / "mini"
    report = (recipe / "RESULTS_zh.md").read_text()
    assert "blstm_cmkt_own_character" in report and "transcript" in report
    store = recipe / "dump_zh" / "llm" / "own_character" / "train"
    tokens, text = (dict(line.split(maxsplit=1) for line in (store / name).read_text().splitlines())
                    for name in ("tokens", "text"))  # fmt: skip
    assert len(text) == 80
    pairs = [pair for u in text for pair in zip(tokens[u].split(), text[u], strict=True)]
    known = [token == character for token, character in pairs if token != "[UNK]"]
    # A token a character; unknown are some of the lines that were held out of the model's training.
    assert all(known) and len(known) > 0.95 * len(pairs)
    again = run([repository / "run.sh", *small])
    assert again.returncode == 0 and "lm-train" not in again.stdout


def test_mini_without_transcripts_and_without_text(repository):
    """A recogniser's text takes the place of transcripts; `none` is the baseline."""
    shared = [*SMALL, "--enh_config", "egs/mini/conf/train_blstm_cmkt.yaml", "--stop_stage", "5"]
    recipe = repository / "egs" / "mini"
    done = run([repository / "run.sh", *shared, "--text_source", "asr"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    config = yaml.safe_load(
        (recipe / "exp" / "blstm_cmkt_minilm_asr_seed0" / "config.yaml").read_text()
    )
    text = config["linguistic_meta"]["text"]
    assert text["source"] == "asr" and "pocketsphinx" in str(text) and 0 < text["wer"]["rate"]
    shared[-3] = "egs/mini/conf/train_blstm.yaml egs/mini/conf/train_blstm_cmkt.yaml"
    done = run([repository / "run.sh", *shared, "--text_source", "none"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    weights = [
        torch.load(recipe / "exp" / tag / "2epoch.pth", weights_only=True)
        for tag in ("blstm_cmkt_minilm_none_seed0", "blstm_seed0")
    ]
    assert not list((recipe / "exp").glob("blstm_seed0.old-*"))  # the baseline is what it was
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_mini_mixed_on_the_fly_in_rooms_with_babble_at_8_khz(repository, tmp_path):
    """What docs/data.md offers, in one run: rooms, babble, on-the-fly mixing, another rate."""
    rooms = tmp_path / "rooms"
    simulated = ["cmkt", "simulate-rooms", "--output_dir", rooms, "--rooms", "10"]
    assert run(simulated).returncode == 0
    options = [*SMALL, "--fs", "8000", "--mixing_config", "conf/mixing/all.yaml",
               "--mix_args", f"--babble_share 1 --babble_talkers 1 1 --rir_dir {rooms}",
               "--dumpdir", "dump_8k", "--expdir", "exp_8k",
               "--results", "RESULTS_8k.md"]  # fmt: skip
    done = run([repository / "run.sh", *options])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    recipe = repository / "egs" / "mini"
    experiment = recipe / "exp_8k" / "blstm_cmkt_minilm_online_all_seed0"
    config = yaml.safe_load((experiment / "export" / "config.yaml").read_text())
    assert config["sample_rate"] == 8000
    noises = (recipe / "dump_8k" / "audio" / "test" / "utt2noise").read_text()
    assert noises.count("babble:") == noises.count("\n")
    assert "blstm_online_all" in (recipe / "RESULTS_8k.md").read_text()


@pytest.mark.skipif(not SHARED.exists(), reason="the speech pack is not here")
def test_librispeech_on_real_speech(repository, tmp_path):
    layout = [
        sys.executable,
        SHARED / "tools" / "layout_corpora.py",
        tmp_path,
        "librispeech",
        "noise",
    ]
    assert run(layout).returncode == 0
    for chapter in sorted((tmp_path / "LibriSpeech" / "train-clean-100").iterdir())[40:]:
        shutil.rmtree(chapter)  # a few minutes are enough here
    small = repository / "egs" / "librispeech" / "small.yaml"
    text = (repository / "egs" / "mini" / "conf" / "train_blstm_cmkt.yaml").read_text()
    small.write_text(text)
    done = run([
        repository / "egs" / "librispeech" / "run.sh", "--corpus_dir", tmp_path / "LibriSpeech",
        "--noise_dir", tmp_path / "noise", "--train_args", "--max_epoch 1", "--enh_config", small,
    ])  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "test_other" in (repository / "egs" / "librispeech" / "RESULTS.md").read_text()
