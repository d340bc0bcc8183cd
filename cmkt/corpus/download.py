"""Download and unpack the archives of a corpus.

A recipe's `archives.yaml` says what there is:

    train-clean-100:
      file: train-clean-100.tar.gz
      size: 6387309499  # bytes; absent where it is not published, as md5 and sha256 are
      md5: 2a93770f6d5c6c964bc36631d331a522
      unpacks: LibriSpeech/train-clean-100  # what is there when all of it is unpacked
      nested: wav/*.tar.gz  # archives in `unpacks`, unpacked where they lie; mostly absent
      urls: [https://..., https://a.mirror/...]

A cut download goes on where it ended, from the same address or the next. An archive gets its name
when it is whole, and a tree its place: a marker tells the trees that were unpacked from others.
"""

import gzip
import hashlib
import http.client
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from cmkt.errors import CmktError
from cmkt.settings import read_mapping
from cmkt.stage import lock

BLOCK = 1 << 20  # bytes
TIMEOUT = 30.0  # seconds without a byte
WAITS = (1, 5, 30)  # seconds before an address that was cut off is tried again
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
BAD_ARCHIVE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


class _Failure(Exception):
    """Why nothing comes from one address."""


@dataclass(frozen=True)
class Archive:
    """One entry of the table; see the module's text for the fields."""

    file: str
    unpacks: str
    urls: list[str]
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    nested: str | None = None

    def fault(self, path: Path) -> str | None:
        """Return what is wrong with a file, None if it is whole as far as the table knows."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size} bytes, expected {self.size}"
        for kind, expected in (("md5", self.md5), ("sha256", self.sha256)):
            if expected is not None:
                found = _digest(path, kind)
                if found != expected:
                    return f"{kind} {found}, expected {expected}"
        return None


def read_archives(table: Path) -> dict[str, Archive]:
    """Read an `archives.yaml`.

    Raises:
        CmktError: no table, or an entry with unknown or missing keys.
    """
    archives = {}
    for name, entry in read_mapping(table, "table of archives").items():
        try:
            archives[name] = Archive(**entry)
        except TypeError as error:
            raise CmktError(f"{name}: {error}", table) from error
    return archives


def download(table: Path, names: list[str], folder: Path) -> None:
    """Download and unpack archives; does nothing for those that are there already.

    Args:
        table: an `archives.yaml`.
        names: which of its entries.
        folder: where archives and trees go; the archives stay and may be removed by hand.

    Raises:
        CmktError: no address gives the archive, it is not the right one or not whole, or there is
            too little space.
    """
    archives = read_archives(table)
    for name in names:
        if name not in archives:
            raise CmktError(f"no archive {name}", table, remedy=f"there are {', '.join(archives)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [archives[name] for name in names if not _is_unpacked(archives[name], folder)]
        _check(wanted, folder)
        for archive in wanted:
            with lock(folder / archive.file):
                if not (folder / archive.file).exists():
                    _fetch(archive, folder)
                _unpack(archive, folder)
    except OSError as error:
        what = error.strerror or str(error)
        raise CmktError(what, folder, remedy="mend this and run again: it goes on") from error


def _marker(archive: Archive, folder: Path) -> Path:
    return folder / f".{archive.file}.unpacked"


def _work(archive: Archive, folder: Path) -> Path:
    return folder / f".{archive.file}.work"


def _is_unpacked(archive: Archive, folder: Path) -> bool:
    tree = folder / archive.unpacks
    if not tree.exists():
        return False
    if not (_marker(archive, folder).exists() or _work(archive, folder).exists()):
        raise CmktError(
            "is there, but not by this download, so it may not be whole",
            tree,
            remedy="if it is whole give it as --corpus_dir, else remove it",
        )
    return _marker(archive, folder).exists()


def _check(archives: list[Archive], folder: Path) -> None:
    """Refuse files that lie there half, and a disk that is too small."""
    needed = 0
    for archive in archives:
        path, part = folder / archive.file, folder / f"{archive.file}.part"
        fault = archive.fault(path) if path.exists() else None
        if fault:
            raise CmktError(
                f"not the whole archive: {fault}",
                path,
                remedy=f"remove it, or rename it to {part.name} to go on from there",
            )
        # Unpacked speech is about as large as its archive.
        needed += (archive.size or 0) * (1 if path.exists() else 2)
        needed -= part.stat().st_size if part.exists() and archive.size else 0
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CmktError(
            f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            folder,
            remedy="give another --download_dir",
        )


def _bar(label: str, total: int | None, start: int = 0, leave: bool = True):
    from tqdm import tqdm

    units = {"unit": "B", "unit_scale": True, "mininterval": 0.5}
    return tqdm(total=total, initial=start, desc=label, leave=leave, **units)


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind)
    with path.open("rb") as stream, _bar(f"check {path.name}", path.stat().st_size) as bar:
        while block := stream.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _fetch(archive: Archive, folder: Path) -> None:
    """Make `folder/file` from the first address that gives all of it."""
    part = folder / f"{archive.file}.part"
    urls, problems = list(archive.urls), []
    while urls:
        url = urls.pop(0)
        resumed = part.exists()
        try:
            _transfer(url, part, archive.size)
            problem = archive.fault(part)
            if problem:
                part.unlink()
                if resumed:  # what lay there may have been wrong, not this address
                    urls.insert(0, url)
        except _Failure as error:
            problem = str(error)
        if not problem:
            part.replace(folder / archive.file)
            return
        problems.append(f"{url}: {problem}")
    raise CmktError(
        f"cannot be downloaded: {'; '.join(problems)}",
        folder / archive.file,
        remedy="run again later, or fetch the file there by hand and run again",
    )


def _transfer(url: str, part: Path, size: int | None) -> None:
    """Bring `part` to its full length, going on where it ends."""
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()
    waits = iter(())
    while True:
        start = part.stat().st_size if part.exists() else 0
        if start and start == size:
            return
        try:
            if _receive(url, part, start, size):
                return
            problem = "cut off"
        except urllib.error.HTTPError as error:
            problem = f"HTTP status {error.code}"
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                part.unlink()
                continue
        except NETWORK_ERRORS as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
        # Who has sent something is worth waiting for, who has not is left for the next mirror.
        if part.exists() and part.stat().st_size > start:
            waits = iter(WAITS)
        wait = next(waits, None)
        if wait is None:
            raise _Failure(problem)
        time.sleep(wait)


def _receive(url: str, part: Path, start: int, size: int | None) -> bool:
    """Append to `part` what one connection gives; tell whether that was all of it."""
    headers = {"User-Agent": "cmkt", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server sends all of it
        length = response.headers["Content-Length"]
        total = size if length is None else start + int(length)
        if size is not None and total != size:
            raise _Failure(f"{total} bytes, expected {size}")
        with part.open("ab") as stream, _bar(part.stem, total, start) as bar:
            stream.truncate(start)
            while block := response.read(BLOCK):
                stream.write(block)
                bar.update(len(block))
            return total is None or stream.tell() == total


def _unpack(archive: Archive, folder: Path) -> None:
    path, work = folder / archive.file, _work(archive, folder)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _extract(path, work)
        if archive.nested:
            for inner in sorted((work / archive.unpacks).glob(archive.nested)):
                _extract(inner, inner.parent, leave=False)
                inner.unlink()
    except BAD_ARCHIVE as error:
        shutil.rmtree(work)
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise CmktError(
            f"cannot be unpacked, perhaps not whole: {what}", path, remedy="remove it and run again"
        ) from error
    if not (work / archive.unpacks).exists():
        shutil.rmtree(work)
        raise CmktError(f"holds no {archive.unpacks}", path, remedy="is it the right archive?")
    _merge(work, folder)
    _marker(archive, folder).touch()
    shutil.rmtree(work)


def _extract(path: Path, folder: Path, leave: bool = True) -> None:
    """Unpack a zip or tar archive, whose members cannot leave the folder."""
    label = f"unpack {path.name}"
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            with _bar(label, sum(m.file_size for m in members), leave=leave) as bar:
                for member in members:
                    archive.extract(member, folder)
                    bar.update(member.file_size)
        return
    with path.open("rb") as stream, _bar(label, path.stat().st_size, leave=leave) as bar:
        with tarfile.open(fileobj=stream) as archive:
            for member in archive:
                archive.extract(member, folder, filter="data")
                bar.update(stream.tell() - bar.n)


def _merge(source: Path, target: Path) -> None:
    """Move all of a tree into another one."""
    for path in source.iterdir():
        there = target / path.name
        if path.is_dir() and not path.is_symlink() and there.is_dir():
            _merge(path, there)
        else:
            path.replace(there)
