"""`cmkt lm-train`: what its models know, what they are made from, and what they refuse."""

import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from cmkt.cli import main
from cmkt.linguistic.config import LanguageModelConfig, read_config
from cmkt.linguistic.embedder import Embedder
from cmkt.linguistic.lm_train import TrainingOptions, split_lines
from cmkt.linguistic.models import find_model
from cmkt.linguistic.vocabulary import (
    character_tokenizer,
    sentencepiece_tokenizer,
    train_sentencepiece,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--hidden_size", "32", "--layers", "2", "--heads", "2"]
SHORT = [*SMALL, "--max_steps", "3", "--batch_size", "8"]

# Whoever eats or drives what, where: only the neighbours tell which words belong together.
CLASSES = {
    "animal": "dog cat horse rabbit mouse goat".split(),
    "food": "bread carrots hay cheese apples grass".split(),
    "vehicle": "truck bus train tractor taxi van".split(),
    "load": "boxes people gravel furniture parcels coal".split(),
}


def grammar_lines() -> list[str]:
    meals = itertools.product(CLASSES["animal"], ("eats", "smells"), CLASSES["food"])
    rides = itertools.product(CLASSES["vehicle"], ("carries", "brings"), CLASSES["load"])
    lines = [f"the {who} {does} the {what}" for who, does, what in [*meals, *rides]]
    return lines + [f"today {line}" for line in lines] + [f"{line} again" for line in lines]


def recipe_sentences(language: str) -> list[str]:
    """Return the real sentences of the embedded corpus."""
    code = (
        "import sys; from sentences import all_sentences; print(*all_sentences(0, sys.argv[1]),"
        " sep='\\n')"
    )
    command = [sys.executable, "-c", code, language]
    local = REPOSITORY / "egs" / "mini" / "local"
    return subprocess.run(
        command, cwd=local, capture_output=True, check=True, encoding="utf-8"
    ).stdout.splitlines()


def write_text(path: Path, lines: list[str]) -> Path:
    table = "".join(f"utterance{number:05d} {line}\n" for number, line in enumerate(lines))
    path.write_text(table, encoding="utf-8")
    return path


def lm_train(text: Path, output: Path | None, *more) -> int:
    where = [] if output is None else ["--output_dir", str(output)]
    return main(["lm-train", "--text", str(text), *where, *map(str, more)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model of the grammar above."""
    root = tmp_path_factory.mktemp("trained")
    text = write_text(root / "text", grammar_lines())
    options = [*SMALL, "--max_steps", 400, "--learning_rate", 0.003]
    assert lm_train(text, root / "model", *options) == 0
    return root / "model"


def test_it_guesses_unseen_lines_better_than_word_frequencies(trained):
    meta = yaml.safe_load((trained / "meta.yaml").read_text())
    assert meta["lines"] + meta["held_out_lines"] == len(grammar_lines())
    assert meta["held_out_accuracy"] > meta["unigram_accuracy"] + 0.15
    assert meta["held_out_loss"] < meta["unigram_loss"] - 0.5


def test_the_stored_weights_are_those_that_were_scored(trained):
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model, report = AutoModelForMaskedLM.from_pretrained(trained, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(trained)
    right = []
    for line in split_lines(grammar_lines(), seed=0)[1]:
        ids = torch.tensor(tokenizer(line)["input_ids"])
        middle = torch.arange(1, len(ids) - 1)  # the tokens but [CLS] and [SEP]
        masked = ids.repeat(len(middle), 1)
        masked[middle - 1, middle] = tokenizer.mask_token_id
        with torch.inference_mode():
            guesses = model(masked).logits[middle - 1, middle].argmax(-1)
        right += (guesses == ids[middle]).tolist()
    meta = yaml.safe_load((trained / "meta.yaml").read_text())
    assert len(right) == meta["held_out_tokens"]
    # One masked token at a time is a little easier than the 15 % of the score.
    assert -0.02 < np.mean(right) - meta["held_out_accuracy"] < 0.2


@pytest.mark.parametrize("layer", ["1:-1", -1])  # the first one is that of conf/llm/own.yaml
def test_words_of_one_class_are_closer_than_words_of_two(trained, layer):
    config = LanguageModelConfig(model=str(trained), layer=layer, unit="word")
    embedder = Embedder(find_model(str(trained)), config)
    prepared = embedder.prepare(grammar_lines())
    vectors: dict[str, list[np.ndarray]] = {}
    for one, matrix in zip(prepared, embedder.embed(prepared), strict=True):
        for string, vector in zip(one.strings, matrix, strict=True):
            vectors.setdefault(string, []).append(vector)
    words = [(word, name) for name, members in CLASSES.items() for word in members]
    mean = np.stack([np.mean(vectors[word], axis=0) for word, _ in words])
    mean -= mean.mean(axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    same, other = [], []
    for a, b in itertools.combinations(range(len(words)), 2):
        (same if words[a][1] == words[b][1] else other).append(mean[a] @ mean[b])
    ordered = np.mean([np.mean(one > np.array(other)) for one in same])  # 0.5 by chance
    assert ordered > 0.8


def test_embed_takes_it_like_any_other_model(trained, tmp_path):
    text = write_text(tmp_path / "text", ["the dog eats the hay", "the bus", "zebras " * 40])
    store = ["--output_dir", str(tmp_path / "store"), "--model", str(trained)]
    assert main(["embed", "--text", str(text), *store]) == 0
    meta = yaml.safe_load((tmp_path / "store" / "meta.yaml").read_text())
    assert meta["dimension"] == 32
    long = (tmp_path / "store" / "long").read_text()
    assert "utterance00002 split" in long  # into windows no longer than what was trained on


@pytest.mark.parametrize("lines", ["en", "grammar"])
def test_the_fast_tokenizer_segments_as_sentencepiece(lines):
    import sentencepiece

    sentences = recipe_sentences(lines) if lines == "en" else grammar_lines()
    training = sentences[: len(sentences) // 2]
    own = sentencepiece_tokenizer(training, 200)
    processor = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(training, 200))
    assert len(own) == len(processor)
    # Real lines, and what NFKC, white space and unknown characters make hard.
    hard = [
        "ﬁne  ＦＵＬＬ　width",
        "e\u0301 Ⅷ ①",
        "  lead",
        "a\tb",
        "naïve café",
        "😀 ok",
        "",
        "다",
    ]
    for line in sentences + hard:
        assert own(line)["input_ids"] == [2, *processor.encode(line), 3]


def test_a_character_is_a_token_and_unseen_ones_are_unknown():
    sentences = recipe_sentences("zh")
    tokenizer = character_tokenizer(sentences)
    for line in sentences:
        assert tokenizer.tokenize(line) == list(line)
    assert tokenizer.unk_token_id not in tokenizer(sentences[0])["input_ids"]
    assert character_tokenizer(["我 abc 我"]).tokenize("我 c鱷") == ["我", "c", "[UNK]"]
    # A smaller vocabulary keeps the frequent ones; special tokens count.
    assert character_tokenizer(["我我你"], 6).tokenize("我你") == ["我", "[UNK]"]


def test_held_out_lines_are_never_trained_on(tmp_path):
    lines = [*grammar_lines(), *grammar_lines()[:50]]
    training, held_out = split_lines(lines, seed=0)
    assert not set(training) & set(held_out)
    assert len(held_out) == round(0.05 * len(set(lines)))
    counts = {line: lines.count(line) for line in held_out}
    assert len(training) + sum(counts.values()) == len(lines)
    assert split_lines(lines, seed=1)[1] != held_out
    assert len(split_lines(lines[:60], seed=0)[1]) == 10
    # Each line has a letter of its own, so a vocabulary tells which lines were used.
    own = [f"line {chr(0x4E00 + number)}" for number in range(60)]
    assert lm_train(write_text(tmp_path / "text", own), tmp_path / "lm", *SHORT,
                    "--vocabulary", "character") == 0  # fmt: skip
    vocabulary = json.loads((tmp_path / "lm" / "tokenizer.json").read_text())["model"]["vocab"]
    absent = {line for line in own if line[-1] not in vocabulary}
    assert absent == set(split_lines(own, seed=0)[1])


def test_same_seed_same_files_and_a_second_run_does_nothing(tmp_path, capsys):
    text = write_text(tmp_path / "text", grammar_lines())
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert lm_train(text, tmp_path / name, *SHORT, "--seed", seed) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ac"]
    assert weights[0] != weights[1]
    before = (tmp_path / "a" / "config.json").stat().st_mtime_ns
    capsys.readouterr()
    assert lm_train(text, tmp_path / "a", *SHORT) == 0
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "a" / "config.json").stat().st_mtime_ns == before
    write_text(text, grammar_lines()[:-1])
    assert lm_train(text, tmp_path / "a", *SHORT) == 0
    assert (tmp_path / "a" / "config.json").stat().st_mtime_ns != before


def test_a_killed_training_does_not_count_as_finished(tmp_path):
    text = write_text(tmp_path / "text", grammar_lines())
    command = [sys.executable, "-m", "cmkt.cli", "lm-train", "--text", str(text), *SMALL]
    command += ["--output_dir", str(tmp_path / "lm"), "--max_steps", "1000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    told = b""
    while b"step/s" not in told:  # the progress bar: it is training
        told += process.stderr.read(1) or pytest.fail(told.decode())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    work = tmp_path / ".lm.work"
    assert work.exists() and not (tmp_path / "lm").exists()
    assert lm_train(text, tmp_path / "lm", *SHORT) == 0
    assert not work.exists() and (tmp_path / "lm" / ".done.json").exists()


def test_a_configuration_gives_options_folder_and_normaliser(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": "dump/lm/own",
        "normaliser": "lower",
        "lm_train": {"vocabulary": "character", "hidden_size": 16, "heads": 2, "max_steps": 3},
    }
    Path("own.yaml").write_text(yaml.safe_dump(config))
    text = write_text(Path("text"), [line.upper() for line in grammar_lines()])
    assert lm_train(text, None, "--llm_config", "own.yaml", "--layers", 1, "--heads", 4) == 0
    made = json.loads(Path("dump/lm/own/config.json").read_text())
    assert (made["hidden_size"], made["num_hidden_layers"]) == (16, 1)
    assert made["num_attention_heads"] == 4  # the command line goes before the YAML
    assert "d" in json.loads(Path("dump/lm/own/tokenizer.json").read_text())["model"]["vocab"]
    store = ["--output_dir", "store", "--llm_config", "own.yaml"]
    assert main(["embed", "--text", "text", *store]) == 0
    assert Path("store/tokens").read_text().split()[1:4] == ["t", "h", "e"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("lm_train: {layer: 2}", ["own.yaml:2", "unknown key layer", "layers"]),
        ("lm_train: {layers: two}", ["own.yaml:2", "'two'", "whole number"]),
        ("lm_train:\n  seed: 0\n  layers: true", ["own.yaml:4", "whole number"]),
        ("lm_train: {vocabulary: bpe}", ["own.yaml:2", "sentencepiece, character"]),
        ("lm_train: {hidden_size: 30}", ["own.yaml:2", "4 heads"]),
        ("lm_train: {max_steps: 0}", ["own.yaml:2", "at least 1"]),
        ("lm_train: {learning_rate: 1e-3}", ["own.yaml:2", "a number like 0.001"]),
        ("layer: -1", ["own.yaml", "--output_dir"]),  # the model is not ours to write
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path, monkeypatch, capsys, extra, words):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(f"model: dump/lm/own\n{extra}\n")
    text = write_text(Path("text"), grammar_lines())
    assert lm_train(text, None, "--llm_config", "own.yaml") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert not Path("dump").exists()


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ([], [], ["text", "no transcripts"]),
        (["the dog"] * 1000, [], ["text", "1 different lines", "at least 50"]),
        (["?! ..."] * 100, [], ["text", "0 different lines"]),
        (grammar_lines(), ["--vocab_size", 12], ["vocab_size: 12", "at least"]),
        (grammar_lines(), ["--heads", 5], ["hidden_size", "5 heads"]),
        (grammar_lines(), ["--device", "cuda:99"], ["device cuda:99", "--device cpu"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, lines, options, words):
    (tmp_path / "own.yaml").write_text("model: x\nnormaliser: english\n")
    text = write_text(tmp_path / "text", lines)
    more = ["--llm_config", tmp_path / "own.yaml", *options]
    assert lm_train(text, tmp_path / "lm", *more) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert not (tmp_path / "lm").exists()


def test_a_folder_of_others_is_left_alone(tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    text = write_text(tmp_path / "text", grammar_lines())
    assert lm_train(text, tmp_path / "precious", *SHORT) == 1
    assert "another --output_dir" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]


def test_a_small_text_gets_fewer_pieces_and_says_so(capsys):
    lines = grammar_lines()
    random.Random(0).shuffle(lines)
    assert len(sentencepiece_tokenizer(lines, 5000)) < 1000
    assert "pieces only, not the 5000 wanted" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["own", "own_character"])
def test_the_shipped_configurations_are_valid(name):
    config = read_config(REPOSITORY / "conf" / "llm" / f"{name}.yaml")
    options = TrainingOptions(**config.lm_train)
    assert not Path(config.model).is_absolute()
    assert options.vocabulary == ("character" if name == "own_character" else "sentencepiece")
