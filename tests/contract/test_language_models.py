"""Every kind of Hugging Face language model through the one embedder, against plain transformers.

Tiny, randomly initialised models with the tokenizer class and the vocabulary files of the real
ones; about forty seconds. `pytest -v` prints the matrix of kinds, units and layers.
"""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cmkt.errors import CmktError
from cmkt.linguistic.config import LanguageModelConfig, read_config
from cmkt.linguistic.embedder import Embedder
from cmkt.linguistic.models import find_model

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [
    "the king sat on his throne",
    "unbelievably, the storytellers whispered throughout the evening!",
    "\u4f60\u597d \u4e16\u754c",  # Han characters, several bytes each
    "a",
]
CORPUS = TEXTS + [
    "she sells sea shells by the shore and he tells the story of a queen",
    "what a wonderful morning it was when the sun came up over the hills",
]
POSITIONS = 80

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SMALL, "intermediate_size": 32, "max_position_embeddings": POSITIONS}
ROBERTA = {**BERT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
# As wide as the blocks of 4-bit weights.
LLAMA = {**BERT, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 1}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
OPT = {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": POSITIONS}
T5 = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
              "max_position_embeddings": POSITIONS}  # fmt: skip
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}

FAIRSEQ = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SPM_T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
SPM_LLAMA = {"model_type": "bpe", "byte_fallback": True}
SPM_ALBERT = {"control_symbols": "[CLS],[SEP],[MASK]", "pad_id": 0, "unk_id": 1, "bos_id": -1,
              "eos_id": -1}  # fmt: skip
SPM_DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]",
               "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}  # fmt: skip

# kind: configuration class, its values, tokenizer class, what writes the vocabulary files
KINDS = {
    "BERT": ("BertConfig", BERT, "BertTokenizer", ("wordpiece",)),
    "MiniLM": ("BertConfig", BERT, "BertTokenizer", ("wordpiece",)),
    "DistilBERT": ("DistilBertConfig", DISTILBERT, "DistilBertTokenizer", ("wordpiece",)),
    "ELECTRA": ("ElectraConfig", {**BERT, "embedding_size": 8}, "ElectraTokenizer", ("wordpiece",)),
    "RoBERTa": ("RobertaConfig", ROBERTA, "RobertaTokenizer", ("bpe", FAIRSEQ)),
    "DeBERTa": ("DebertaConfig", DEBERTA, "DebertaTokenizer",
                ("bpe", ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"])),
    "DeBERTa-v2": ("DebertaV2Config", DEBERTA, "DebertaV2Tokenizer",
                   ("sentencepiece", "spm.model", SPM_DEBERTA)),
    "ALBERT": ("AlbertConfig", {**BERT, "embedding_size": 8}, "AlbertTokenizer",
               ("sentencepiece", "spiece.model", SPM_ALBERT)),
    "XLM-R": ("XLMRobertaConfig", ROBERTA, "XLMRobertaTokenizer",
              ("sentencepiece", "sentencepiece.bpe.model", {})),
    "GPT-2": ("GPT2Config", GPT2, "GPT2Tokenizer", ("bpe", ["<|endoftext|>"])),
    "OPT": ("OPTConfig", OPT, "GPT2Tokenizer",
            ("bpe", FAIRSEQ, {"bos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True})),
    "Qwen": ("Qwen2Config", LLAMA, "Qwen2Tokenizer", ("bpe", ["<|endoftext|>"])),
    "LLaMA": ("LlamaConfig", LLAMA, "LlamaTokenizer",
              ("sentencepiece", "tokenizer.model", SPM_LLAMA)),
    "Mistral": ("MistralConfig", LLAMA, "LlamaTokenizer",
                ("sentencepiece", "tokenizer.model", SPM_LLAMA)),
    "Gemma": ("GemmaConfig", LLAMA, "GemmaTokenizer", ("gemma",)),
    "T5": ("T5Config", T5, "T5Tokenizer", ("sentencepiece", "spiece.model", SPM_T5)),
    "mT5": ("MT5Config", T5, "T5Tokenizer", ("sentencepiece", "spiece.model", SPM_T5)),
    "ByT5 (slow)": ("T5Config", T5, "ByT5Tokenizer", ("bytes",)),
    "BERT generation (slow)": ("BertGenerationConfig", BERT, "BertGenerationTokenizer",
                               ("sentencepiece", "spiece.model", {})),
}  # fmt: skip
SLOW = [kind for kind in KINDS if "slow" in kind]
FAST = [kind for kind in KINDS if kind not in SLOW]
DECODERS = ["GPT-2", "OPT", "Qwen", "LLaMA", "Mistral", "Gemma"]
LAYERS = [-1, 0, "0:-1", "input"]


def wordpiece(folder: Path) -> None:
    from tokenizers import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=150, show_progress=False)
    trained.save_model(str(folder))


def bpe(folder: Path, special: list[str], settings: dict | None = None) -> dict:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=330, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    return settings or {}


def sentencepiece(folder: Path, name: str, options: dict) -> None:
    from sentencepiece import SentencePieceTrainer

    trained = folder / "trained"
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_prefix=str(trained), minloglevel=2,
        vocab_size=350 if options.get("byte_fallback") else 80, hard_vocab_limit=False, **options,
    )  # fmt: skip
    trained.with_suffix(".model").rename(folder / name)
    trained.with_suffix(".vocab").unlink()


def gemma(folder: Path) -> None:
    # The hub has Gemma's vocabulary as a tokenizer.json only.
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    characters = sorted(set("".join(CORPUS).replace(" ", "\u2581")))
    merges = [("t", "h"), ("th", "e"), ("\u2581", "s")]
    pieces = special + [f"<0x{i:02X}>" for i in range(256)] + characters + ["th", "the", "\u2581s"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    GemmaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that makes the folder of one kind of model, once."""

    @functools.cache
    def make(kind: str) -> Path:
        import torch
        import transformers

        name, values, tokenizer_class, (writer, *options) = KINDS[kind]
        folder = tmp_path_factory.mktemp("model")
        write = {"wordpiece": wordpiece, "bpe": bpe, "sentencepiece": sentencepiece}.get(writer)
        settings = {"tokenizer_class": tokenizer_class}
        if write:
            settings |= write(folder, *options) or {}
        if writer == "gemma":
            gemma(folder)
        else:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config = getattr(transformers, name)(**values)
        config.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.is_fast == (kind not in SLOW)
        config.vocab_size = len(tokenizer)
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def plain(folder_of):
    """A function that runs transformers itself on one text."""

    @functools.cache
    def load(kind: str):
        from transformers import AutoModel, AutoTokenizer

        folder = folder_of(kind)
        model = AutoModel.from_pretrained(folder, dtype="float32").eval()
        return AutoTokenizer.from_pretrained(folder), model

    def run(kind: str, text: str, layer):
        import torch

        tokenizer, model = load(kind)
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            if layer == "input":
                states = model.get_input_embeddings()(inputs["input_ids"])
            else:
                hidden = model(**inputs, output_hidden_states=True).hidden_states
                states = torch.stack(hidden).mean(0) if layer == "0:-1" else hidden[layer]
        return inputs["input_ids"][0].tolist(), states[0].numpy()

    return run


def embedder(folder: Path, **options) -> Embedder:
    return Embedder(find_model(str(folder)), LanguageModelConfig(model=str(folder), **options))


def own_tokens(tokenizer, text: str, ids: list[int]) -> slice:
    """Find where the text's own tokens are among those with special ones."""
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return slice(begin, begin + len(bare))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"layer {layer}")
@pytest.mark.parametrize("kind", KINDS)
def test_token(kind, layer, folder_of, plain):
    made = embedder(folder_of(kind), layer=layer)
    prepared = made.prepare(TEXTS)
    matrices = made.embed(prepared)
    for text, one, matrix in zip(TEXTS, prepared, matrices, strict=True):
        ids, states = plain(kind, text, layer)
        assert one.windows == [ids] and one.size == len(ids) and one.note is None
        own = own_tokens(made.tokenizer, text, ids)
        assert matrix.dtype == np.float32
        assert matrix.shape == (len(one.strings), made.dimension) == states[own].shape
        assert not any(string.split() != [string] for string in one.strings)
        # Also independence of the batch: the plain call sees this text alone.
        np.testing.assert_allclose(matrix, states[own], atol=2e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"layer {layer}")
@pytest.mark.parametrize("unit", ["word", "character"])
@pytest.mark.parametrize("kind", FAST)
def test_unit(kind, unit, layer, folder_of, plain):
    made = embedder(folder_of(kind), layer=layer, unit=unit)
    prepared = made.prepare(TEXTS)
    for text, one, matrix in zip(TEXTS, prepared, made.embed(prepared), strict=True):
        ids, states = plain(kind, text, layer)
        wanted = text.split() if unit == "word" else list("".join(text.split()))
        assert one.strings == wanted
        assert matrix.shape == (len(wanted), made.dimension)
        encoding = made.tokenizer(text, return_offsets_mapping=True)
        pieces = [
            (position, begin, end)
            for position, (begin, end) in enumerate(encoding["offset_mapping"])
            if encoding.tokens()[position] not in ("\u2581", "\u0120")
            and position in range(*own_tokens(made.tokenizer, text, ids).indices(len(ids)))
        ]
        cursor = 0
        for string, row in zip(wanted, matrix, strict=True):
            start = text.index(string, cursor)
            cursor = start + len(string)
            mine = [p for p, begin, end in pieces if begin < cursor and end > start]
            np.testing.assert_allclose(row, states[mine].mean(0), atol=2e-5)


@pytest.mark.parametrize("unit", ["token", "word", "character"])
@pytest.mark.parametrize("kind", DECODERS)
def test_prompt_is_seen_by_the_model_and_dropped(kind, unit, folder_of, plain):
    template = "the story of {text} it was"
    made = embedder(folder_of(kind), unit=unit, prompt=template)
    without = embedder(folder_of(kind), unit=unit)
    text = "a queen"
    prepared, bare = made.prepare([text]), without.prepare([text])
    ids, states = plain(kind, template.format(text=text), -1)
    assert prepared[0].windows == [ids]
    (matrix,) = made.embed(prepared)
    shown = "".join(prepared[0].strings).replace("\u0120", "").replace("\u2581", "")
    assert shown == "aqueen"
    if unit == "token":
        assert any(np.allclose(states[i : i + len(matrix)], matrix, atol=2e-5)
                   for i in range(len(states)))  # fmt: skip
    else:
        assert prepared[0].strings == bare[0].strings
        assert not np.allclose(matrix, without.embed(bare)[0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_long_text_is_split_and_truncated_at_the_models_positions(kind, folder_of):
    text = " ".join(CORPUS[4:] * 40)
    made = embedder(folder_of(kind), batch_tokens=200)
    bare = made.tokenizer(text, add_special_tokens=False)["input_ids"]
    (one,) = made.prepare([text])
    assert len(one.windows) > 1 and f"split into {len(one.windows)} pieces" in one.note
    (matrix,) = made.embed([one])
    assert matrix.shape == (len(bare), made.dimension) and np.isfinite(matrix).all()
    short = embedder(folder_of(kind), too_long="truncate")
    (cut,) = short.prepare([text])
    assert len(cut.windows) == 1 and cut.note.startswith(f"truncated from {len(bare)} to ")
    (matrix,) = short.embed([cut])
    assert len(matrix) == len(cut.strings) < len(bare)
    assert len(cut.windows[0]) == max(map(len, cut.windows)) >= max(map(len, one.windows))
    assert np.isfinite(matrix).all()


@pytest.mark.parametrize("kind", ["BERT", "RoBERTa", "XLM-R"])
def test_a_text_that_fills_the_positions_is_one_window(kind, folder_of):
    # RoBERTa's positions begin behind its padding token's.
    made = embedder(folder_of(kind))
    limit = POSITIONS - (0 if kind == "BERT" else 2)
    count = 0
    for words in range(1, POSITIONS):
        (one,) = made.prepare([" ".join(["a"] * words)])
        (matrix,) = made.embed([one])
        assert len(matrix) == len(one.strings)
        if len(one.windows) == 1:
            count = max(count, one.size)
    assert count == limit or count == limit - 1  # a word may be two tokens


def test_texts_without_a_token_or_with_unknown_ones(folder_of):
    made = embedder(folder_of("BERT"), unit="word")
    empty, space, foreign = made.prepare(["", "  ", "the \u0416\u0416 king"])
    assert empty.strings == space.strings == [] and empty.windows == []
    assert foreign.unknown == ["\u0416\u0416"] and len(foreign.strings) == 3
    assert [len(m) for m in made.embed([empty, foreign])] == [0, 3]
    for kind in SLOW[1:]:
        (one,) = embedder(folder_of(kind)).prepare(["\u0416"])
        assert len(one.unknown) == 1


@pytest.mark.parametrize("kind", ["BERT", "LLaMA", "T5"])
def test_half_precision_gives_float32_near_the_full_one(kind, folder_of):
    full = embedder(folder_of(kind))
    for dtype in ("bfloat16", "float16"):
        half = embedder(folder_of(kind), dtype=dtype)
        for a, b in zip(
            full.embed(full.prepare(TEXTS)), half.embed(half.prepare(TEXTS)), strict=True
        ):
            assert b.dtype == np.float32
            assert not np.array_equal(a, b)
            np.testing.assert_allclose(a, b, atol=0.1)


def test_out_of_memory_halves_the_batch_and_goes_on(folder_of, caplog):
    import torch

    made = embedder(folder_of("BERT"), batch_tokens=4000)
    prepared = made.prepare(TEXTS * 8)
    expected = made.embed(prepared)
    longest = max(one.size for one in prepared)
    allowed, seen = 4 * longest, []

    def out_of_memory(module, args, kwargs):
        seen.append(kwargs["input_ids"].numel())
        if seen[-1] > allowed:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = made.model.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    for a, b in zip(expected, made.embed(prepared), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    failures = sum(size > allowed for size in seen)
    assert len(caplog.records) == failures == 3  # 32 texts, 16, 8, 4
    seen.clear()
    made.embed(prepared)
    assert max(seen) <= allowed  # remembered
    allowed = 0
    with pytest.raises(CmktError, match="no memory for one text") as error:
        made.embed(prepared)
    assert "\n" not in str(error.value)
    hook.remove()


def refused(folder: Path, **options) -> str:
    with pytest.raises(CmktError) as error:
        embedder(folder, **options)
    message = str(error.value)
    assert "\n" not in message and "(" in message
    return message


def test_what_cannot_be_is_refused_in_one_line(folder_of, tmp_path):
    folder = folder_of("BERT")
    for layer in (3, -4, "0:3", "2:1"):
        assert f"layer {layer}: the model has 2 layers" in refused(folder, layer=layer)
    with pytest.raises(CmktError, match="device nonsense"):
        Embedder(find_model(str(folder)), LanguageModelConfig(model="x"), "nonsense")
    for kind in SLOW:
        for options in ({"unit": "word"}, {"unit": "character"}, {"prompt": "say {text}"}):
            assert "does not say where" in refused(folder_of(kind), **options)
    with pytest.raises(CmktError, match="leave no room"):
        embedder(folder, prompt="a " * 100 + "{text}").prepare(["the king"])
    for name in ("vocab.txt", "model.safetensors"):
        incomplete = tmp_path / name
        incomplete.mkdir()
        for file in folder.iterdir():
            if file.name != name:
                (incomplete / file.name).symlink_to(file)
        wanted = "no tokenizer" if name == "vocab.txt" else "not a model folder"
        assert wanted in refused(incomplete)


def test_missing_parameters_are_refused_unless_they_are_not_used(folder_of, tmp_path):
    from safetensors.numpy import load_file, save_file

    for kind, part, fails in (
        ("BERT", "encoder.layer.1.", True),
        ("BERT", "pooler.", False),
        ("T5", "encoder.block.1.", True),
        ("T5", "decoder.", False),
    ):
        whole, partial = folder_of(kind), tmp_path / f"{kind}-{part}"
        partial.mkdir()
        for file in whole.iterdir():
            if file.name != "model.safetensors":
                (partial / file.name).symlink_to(file)
        weights = load_file(whole / "model.safetensors")
        kept = {name: value for name, value in weights.items() if not name.startswith(part)}
        assert len(kept) < len(weights)
        save_file(kept, partial / "model.safetensors", {"format": "pt"})
        if fails:
            assert f"lack {len(weights) - len(kept)} parameters" in refused(partial)
        else:
            one, other = embedder(whole), embedder(partial)
            pairs = zip(
                one.embed(one.prepare(TEXTS)), other.embed(other.prepare(TEXTS)), strict=True
            )
            for a, b in pairs:
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options, module", [
    ({"quantization": "4bit"}, "bitsandbytes"), ({"device_map": "auto"}, "accelerate"),
])  # fmt: skip
def test_a_missing_library_is_named(folder_of, monkeypatch, options, module):
    import importlib.util

    real = importlib.util.find_spec

    def without(name, *more):
        return None if name == module else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert f"{module} is not installed" in refused(folder_of("LLaMA"), **options)


def test_device_map_places_the_model(folder_of):
    pytest.importorskip("accelerate")
    one, other = embedder(folder_of("LLaMA")), embedder(folder_of("LLaMA"), device_map="auto")
    for a, b in zip(one.embed(one.prepare(TEXTS)), other.embed(other.prepare(TEXTS)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_models_are_near_the_full_one(folder_of, bits):
    pytest.importorskip("bitsandbytes")
    one, other = embedder(folder_of("LLaMA")), embedder(folder_of("LLaMA"), quantization=bits)
    for a, b in zip(one.embed(one.prepare(TEXTS)), other.embed(other.prepare(TEXTS)), strict=True):
        assert b.dtype == np.float32 and np.isfinite(b).all()
        assert (
            np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)) > 0.9
        )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["BERT", "LLaMA", "T5"])
def test_bfloat16_on_the_gpu_is_near_float32_on_the_cpu(kind, folder_of):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = find_model(str(folder_of(kind)))
    full = Embedder(model, LanguageModelConfig(model="x"))
    half = Embedder(model, LanguageModelConfig(model="x", dtype="bfloat16"), "cuda")
    for a, b in zip(full.embed(full.prepare(TEXTS)), half.embed(half.prepare(TEXTS)), strict=True):
        np.testing.assert_allclose(a, b, atol=0.1)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_gives_the_hubs_reason_in_one_line(status, tmp_path):
    reason = "Access to model big/Gated is restricted. Please log in."

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.startswith("/api/models/big/Gated")
            answer = {
                "id": "big/Gated",
                "sha": "0" * 40,
                "siblings": [{"rfilename": "config.json"}],
            }
            if "/tree/" in self.path:
                answer = [{"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}]
            body = json.dumps(answer).encode()
            self.send_response(200 if known else status)
            if not known:
                self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("X-Error-Message", reason)
            self.send_header("Content-Length", str(len(body) if known else 0))
            self.end_headers()
            if known:
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    (tmp_path / "text").write_text("a hello\n")
    # The endpoint is read when huggingface_hub is imported.
    run = subprocess.run(
        [sys.executable, "-c",
         "from cmkt.linguistic.models import find_model; find_model('big/Gated')"],
        env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    server.shutdown()
    server.server_close()
    line = run.stderr.strip().splitlines()[-1]
    assert "cmkt.errors.CmktError: the model big/Gated is gated: " in line
    assert reason in line and "hf auth login" in line and f"{address}/big/Gated" in line


def test_ready_configurations_are_read():
    paths = sorted((REPOSITORY / "conf" / "llm").glob("*.yaml"))
    assert len(paths) >= 7
    for path in paths:
        assert "licence" in path.read_text(encoding="utf-8")
        read_config(path)
