"""The one exception that a user is meant to read."""

from pathlib import Path


class CmktError(Exception):
    """Bad input or a missing prerequisite, told in one line.

    Args:
        what: what is wrong.
        file: the file it was found in.
        line: its line, counted from 1.
        remedy: what the user can do about it.
    """

    def __init__(
        self,
        what: str,
        file: str | Path | None = None,
        line: int | None = None,
        remedy: str | None = None,
    ):
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(f"{where}{what}" + (f" ({remedy})" if remedy else ""))
