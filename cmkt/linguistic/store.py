"""The linguistic store: one float matrix (tokens, dimension) for each utterance.

A folder with `linguistic.ark` and `linguistic.scp` (kaldiio), `tokens` (the token strings),
`text` (what was embedded) and `meta.yaml` (which model made it).
"""

from pathlib import Path

import yaml

from cmkt.errors import CmktError


def read_meta(folder: str | Path) -> dict:
    """Read `meta.yaml`: model, revision, layer, dimension, tokenizer, normaliser, ...

    Raises:
        CmktError: the folder is no store.
    """
    path = Path(folder) / "meta.yaml"
    if not path.exists():
        raise CmktError("no linguistic store", folder, remedy="run stage 3 (cmkt embed)")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def require_same_meta(first: str | Path, second: str | Path) -> None:
    """Refuse two stores that different models or settings made.

    Raises:
        CmktError: naming the key that differs.
    """
    one, other = read_meta(first), read_meta(second)
    for key in ("model", "revision", "layer", "dimension", "tokenizer", "normaliser", "weights"):
        if one.get(key) != other.get(key):
            raise CmktError(
                f"{key} is {other.get(key)}, but {one.get(key)} in {first}",
                Path(second) / "meta.yaml",
                remedy="run stage 3 for both sets with one --llm_config",
            )
