"""The one exception that a user is meant to read, and how a command tells it."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path


class CmktError(Exception):
    """Bad input or a missing prerequisite, told in one line.

    Args:
        what: what is wrong.
        file: the file it was found in.
        line: its line, counted from 1.
        remedy: what the user can do about it.

    `more` may be set to lines that are printed after that one.
    """

    more = ""

    def __init__(
        self,
        what: str,
        file: str | Path | None = None,
        line: int | None = None,
        remedy: str | None = None,
    ):
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(f"{where}{what}" + (f" ({remedy})" if remedy else ""))


def run_command(name: str, function: Callable[[], None]) -> int:
    """Run a command and tell in one line what the user must know when it fails.

    Args:
        name: of the command, for the message.
        function: does the work.

    Returns:
        the exit status: 0, 1 for a `CmktError` or a full device, 130 when interrupted.
    """
    try:
        function()
        return 0
    except CmktError as error:
        print(f"{name}: error: {error}", *filter(None, [error.more]), sep="\n", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "the output folder"
        print(
            f"{name}: error: {where}: no space left on the device "
            "(free some and run the same command again)",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
