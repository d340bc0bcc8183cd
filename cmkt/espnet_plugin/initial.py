"""Checks `--init_param` before any training: ESPnet loads parts of a checkpoint without a word."""

import pickle
import zipfile
from pathlib import Path

import torch
import yaml

from cmkt.errors import CmktError

TRANSFER = "transfer."  # parameters that only training needs; a baseline has none


def check_initial_weights(
    model: torch.nn.Module, init_param: str, separator: str, partial: bool
) -> None:
    """Refuse a checkpoint that would leave a part of the model as it was drawn.

    Args:
        model: what is trained.
        init_param: ESPnet's `file:source_key:target_key:excluded_keys`; all but the file may be
            left out.
        separator: name of the model's separator.
        partial: `--ignore_init_mismatch true`, the user's word that a part is enough; then only a
            checkpoint of which nothing fits is refused.

    Raises:
        CmktError: no checkpoint, or one of another model; names both backbones and the first
            parameter that differs. A checkpoint without transfer, as a baseline's, is fine.
    """
    path, source, target, excluded = (*init_param.split(":", 3), "", "", "")[:4]
    found = _read_weights(path)
    for prefix in filter(None, excluded.split(",")):
        found = {key: value for key, value in found.items() if not key.startswith(prefix)}
    if source:
        found = {k[len(source) + 1 :]: v for k, v in found.items() if k.startswith(source)}
    try:
        wanted = model.get_submodule(target).state_dict()
    except AttributeError as error:
        raise CmktError(f"--init_param: the model has no part {target}", path) from error
    fits = [k for k, v in found.items() if k in wanted and v.shape == wanted[k].shape]
    if partial and fits:
        return
    problem = None if fits else "no parameter fits"
    for key in sorted(wanted.keys() | found.keys()):
        if key in found and key in wanted:
            if found[key].shape != wanted[key].shape:
                there, here = tuple(found[key].shape), tuple(wanted[key].shape)
                problem = f"{key} has shape {there} there and {here} here"
                break
        elif not key.startswith(TRANSFER) or key in found:
            problem = f"{key} is only {'there' if key in found else 'in the model'}"
            break
    if problem is None:
        return
    remedy = "give a checkpoint of this backbone, or --ignore_init_mismatch true for what fits"
    if problem.startswith(TRANSFER):
        remedy = f"leave the transfer out: --init_param {path}:::{TRANSFER[:-1]}"
    raise CmktError(
        f"--init_param: weights of {_backbone(path)}, but the model is of separator {separator}: "
        f"{problem}",
        path,
        remedy=remedy,
    )


def _read_weights(path: str) -> dict[str, torch.Tensor]:
    remedy = "give a model file, such as valid.loss_se.best.pth"
    if not Path(path).exists():
        raise CmktError("--init_param: no such file", path)
    if not zipfile.is_zipfile(path):  # torch would read anything for a pickle
        raise CmktError("--init_param: not a model's weights", path, remedy=remedy)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CmktError("--init_param: not a model's weights", path, remedy=remedy) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CmktError("--init_param: not a model's weights", path, remedy=remedy)
    return state


def _backbone(path: str) -> str:
    """Name the separator of a checkpoint by the config.yaml beside it."""
    config = Path(path).resolve().parent / "config.yaml"
    try:
        name = yaml.safe_load(config.read_text(encoding="utf-8"))["separator"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return "an unknown separator (no config.yaml beside it)"
    return f"separator {name}"
