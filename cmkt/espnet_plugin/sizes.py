"""The same training at another size: `--size NAME` of `cmkt train` and `cmkt info`.

A size file lies in the folder `size` beside the training YAML (for a recipe's own YAML, in the
repository's conf/size). Its key `all` changes the training, and a key for each separator changes
the model:

    all:
      batch_bins: 256000
    rnn:
      separator_conf: {layer: 1, unit: 48}
"""

import inspect
from pathlib import Path

from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import PARTS, find_class
from cmkt.settings import read_mapping

ALL = "all"
# What a size may change of the training: not what is learnt, nor from what.
TRAINING = ("batch_type", "batch_bins", "valid_batch_bins", "batch_size", "fold_length",
            "accum_grad", "max_epoch", "patience", "optim_conf", "scheduler_conf", "grad_clip",
            "num_workers", "fast_cpu", "use_amp")  # fmt: skip
MODEL = tuple(f"{kind}_conf" for kind in PARTS)


def apply_size(config: dict, config_path: str | Path, name: str) -> dict:
    """Return a training configuration at another size.

    Args:
        config: of a training; it stays as it is.
        config_path: the YAML that it was read from.
        name: the size is read from `size/<name>.yaml` beside that YAML.

    Returns:
        the configuration with the keys of the size merged into it.

    Raises:
        CmktError: no such size, a separator that it does not have, or a key that it cannot change.
    """
    folder = _size_folder(Path(config_path))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise CmktError(
            f"no such size: {name}", path, remedy=f"known: {known}" if known else "write one"
        )
    sizes = read_mapping(path)
    _check(sizes, path)
    separator = config.get("separator", "rnn")  # ESPnet's default
    if separator not in sizes:
        raise CmktError(f"no size for separator {separator}", path, remedy="add a section for it")
    sized = dict(config)
    for section in (ALL, separator):
        for key, value in (sizes.get(section) or {}).items():
            if section == separator:
                _check_part(config, path, separator, key, value)
            merges = isinstance(value, dict) and isinstance(sized.get(key), dict)
            sized[key] = {**sized[key], **value} if merges else value
    return sized


def _size_folder(config: Path) -> Path:
    """Return the folder `size` beside a YAML or, for one of a recipe, in `conf` above it."""
    beside = config.parent / "size"
    above = [folder / "conf" / "size" for folder in config.resolve().parents]
    return next((folder for folder in [beside, *above] if folder.is_dir()), beside)


def _check(sizes: dict, path: Path) -> None:
    """Refuse a section that is no separator, and a key that no size can change."""
    separators = PARTS["separator"]
    for section, content in sizes.items():
        if section != ALL and section not in separators:
            raise CmktError(
                f"no such separator: {section}", path, _line_of(path, section),
                f"known: {ALL}, {', '.join(separators)}",
            )  # fmt: skip
        if content is not None and not isinstance(content, dict):
            raise CmktError(f"{section} must be a mapping", path, _line_of(path, section))
        known = TRAINING if section == ALL else MODEL
        for key, value in (content or {}).items():
            where = (path, _line_of(path, section, key))
            if key not in known:
                raise CmktError(
                    f"{section}.{key} cannot be changed", *where, f"known: {', '.join(known)}"
                )
            if key.endswith("_conf") and not isinstance(value, dict):
                raise CmktError(f"{section}.{key} must be a mapping", *where)


def _check_part(config: dict, path: Path, separator: str, part: str, content: dict) -> None:
    """Refuse a key that neither the training YAML nor the part itself has."""
    unknown = [key for key in content if key not in (config.get(part) or {})]
    if not unknown:
        return
    kind = part.removesuffix("_conf")
    taken = inspect.signature(find_class(kind, config.get(kind), PARTS[kind])).parameters
    for key in unknown:
        if key not in taken:
            raise CmktError(
                f"{separator}.{part}.{key}: {kind} {config[kind]} has no such key",
                path,
                _line_of(path, separator, part, key),
                f"known: {', '.join(name for name in taken if name != 'input_dim')}",
            )


def _line_of(path: Path, *keys: str) -> int | None:
    """Return the line of a nested key, or of the innermost one that begins a line."""
    found, wanted = None, list(map(str, keys))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if wanted and line.strip().startswith(f"{wanted[0]}:"):
            found = number
            wanted.pop(0)
    return found
