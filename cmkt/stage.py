"""Restartable stages: work under a temporary name, rename at the end, mark completion last.

A finished output folder holds `.done.json`: a fingerprint of the inputs and options it was
made from. The same command finds it and does nothing; another option or another input does
not match it and the work is done again; a killed stage has left no `.done.json`.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cmkt.errors import CmktError

MARKER = ".done.json"


def fingerprint(inputs: Iterable[Path], options: dict) -> str:
    """Hash what a stage depends on.

    Args:
        inputs: files, hashed by content, or folders made by an earlier stage, hashed by their
            marker. A missing one counts as absent.
        options: JSON-like values.

    Returns:
        a hexadecimal SHA-256.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for path in map(Path, inputs):
        source = path / MARKER if path.is_dir() else path
        digest.update(b"\0absent" if not source.exists() else b"\0" + source.read_bytes())
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path, mode: str = "w", **kwargs) -> Iterator:
    """Open a file for writing that gets its final name only when the block ends well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if "b" not in mode:
        kwargs.setdefault("encoding", "utf-8")
    try:
        with open(temporary, mode, **kwargs) as stream:
            yield stream
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """Hold an output for this process; the system lets go of it however the process ends."""
    path = output.with_name(f".{output.name}.lock")
    with open(path, "w") as stream:
        try:
            # Not `flock`, which the workers of a killed process would still hold.
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise CmktError(
                "another process is writing it", output, remedy="wait until it has ended"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Stage:
    """One output folder of one stage.

    Args:
        output: the folder that the stage makes.
        inputs: what it reads (see `fingerprint`).
        options: what its result depends on besides; not the number of jobs.

    Example:
        stage = Stage(out, [data / "text"], {"layer": -1})
        if stage.is_done():
            return
        with stage.working_directory() as work:
            ...write into work...
    """

    def __init__(self, output: str | Path, inputs: Iterable[str | Path], options: dict):
        self.output = Path(output)
        self.fingerprint = fingerprint(map(Path, inputs), options)
        self.options = options

    def is_done(self) -> bool:
        """Tell whether the output is complete and made from these inputs and options."""
        marker = self.output / MARKER
        done = marker.exists() and json.loads(marker.read_text())["fingerprint"] == self.fingerprint
        if done:
            logging.info("%s: up to date", self.output)
        return done

    def finish(self) -> None:
        """Mark `output` complete; for stages that must work in their final folder."""
        self._mark(self.output)

    @contextmanager
    def working_directory(self) -> Iterator[Path]:
        """Give a folder to write into; on success it replaces `output`.

        What a killed run of the same inputs and options left in it is still there, so files
        that were written atomically need not be made again.

        Raises:
            CmktError: another process is making the same output.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.output):
            yield from self._working_directory()

    def _working_directory(self) -> Iterator[Path]:
        work = self.output.with_name(f".{self.output.name}.work")
        owner = work / ".fingerprint"
        if not (owner.exists() and owner.read_text() == self.fingerprint):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            owner.write_text(self.fingerprint)
        yield work
        owner.unlink()
        self._mark(work)
        if self.output.exists():
            shutil.rmtree(self.output)
        work.replace(self.output)

    def _mark(self, folder: Path) -> None:
        marker = {"fingerprint": self.fingerprint, "options": self.options}
        with atomic_file(folder / MARKER) as stream:
            json.dump(marker, stream, default=str)
