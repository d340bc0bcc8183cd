"""YAML files of settings, read with errors that name the file and the line."""

from pathlib import Path

import yaml

from cmkt.errors import CmktError


def read_mapping(path: str | Path, what: str = "file", remedy: str | None = None) -> dict:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        what: it is, for the message when it is not there.
        remedy: what to do then.

    Raises:
        CmktError: missing, not UTF-8, not YAML, or no mapping; names the line where known.
    """
    path = Path(path)
    if not path.is_file():
        raise CmktError(f"no such {what}", path, remedy=remedy)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        raise CmktError(f"not YAML: {getattr(error, 'problem', error)}", path, line) from error
    if not isinstance(content, dict):
        raise CmktError("not a YAML mapping", path)
    return content
