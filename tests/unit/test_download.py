"""Downloads, against a web server of this machine that can be slow-witted, cut off or wrong."""

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from cmkt.corpus import download as module
from cmkt.corpus.download import download, read_archives
from cmkt.corpus.recipe import Corpus, run_recipe
from cmkt.errors import CmktError

REPOSITORY = Path(__file__).resolve().parents[2]


def tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


NOISE = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(2000))  # will not shrink
SPEECH = tar({"Corpus/README": b"hello", "Corpus/part/a.wav": NOISE, "Corpus/part/b.wav": b"b"})


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content`; paths say how: /good, /norange, /missing, /cut."""

    def do_GET(self):  # noqa: N802
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        content, start = self.server.content, 0
        if self.path == "/missing":
            self.send_error(404)
            return
        if wanted and self.path != "/norange":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        # A cut line gives 20000 bytes of a whole request and closes.
        end = 20000 if self.path == "/cut" and not start else None
        self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests = SPEECH, []
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def table(tmp_path, server):
    """Return a function that writes archives.yaml and names its path."""

    def write(*paths, **changes):
        entry = {
            "file": "speech.tar.gz",
            "size": len(SPEECH),
            "md5": hashlib.md5(SPEECH).hexdigest(),
            "unpacks": "Corpus/part",
            "urls": [path if "://" in path else server.address + path for path in paths],
        }
        entry = {key: value for key, value in (entry | changes).items() if value is not None}
        path = tmp_path / "archives.yaml"
        path.write_text(yaml.safe_dump({"speech": entry}))
        return path

    return write


def check_whole(folder):
    assert (folder / "Corpus/part/a.wav").read_bytes() == NOISE
    assert (folder / "Corpus/README").read_bytes() == b"hello"
    assert (folder / "speech.tar.gz").read_bytes() == SPEECH
    visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert visible == {"Corpus", "speech.tar.gz"}
    assert not list(folder.glob(".*.work"))


def test_whole_download_and_a_second_call_that_asks_for_nothing(tmp_path, table, server):
    folder = tmp_path / "data"
    download(table("/good"), ["speech"], folder)
    check_whole(folder)
    (folder / "speech.tar.gz").unlink()  # not needed any more
    download(table("/good"), ["speech"], folder)
    assert server.requests == [("/good", None)]


def test_cut_download_goes_on_where_it_ended(tmp_path, table, server):
    download(table("/cut"), ["speech"], tmp_path / "data")
    check_whole(tmp_path / "data")
    assert server.requests == [("/cut", None), ("/cut", "bytes=20000-")]


@pytest.mark.parametrize("path, wanted", [("/good", "bytes=30000-"), ("/norange", "bytes=30000-")])
def test_part_of_an_earlier_run_is_used_where_the_server_can(tmp_path, table, server, path, wanted):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "speech.tar.gz.part").write_bytes(SPEECH[:30000])
    download(table(path), ["speech"], folder)
    check_whole(folder)
    assert server.requests == [(path, wanted)]


@pytest.mark.parametrize("part", [b"x" * 30000, SPEECH + b"more"])
def test_wrong_part_of_an_earlier_run_is_thrown_away(tmp_path, table, server, part):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "speech.tar.gz.part").write_bytes(part)
    download(table("/good"), ["speech"], folder)
    check_whole(folder)
    assert server.requests[-1] == ("/good", None)


@pytest.mark.parametrize("first", ["http://127.0.0.1:9/refused", "/missing"])
def test_mirror_is_used_when_the_first_address_is_dead(tmp_path, table, server, first):
    download(table(first, "/good"), ["speech"], tmp_path / "data")
    check_whole(tmp_path / "data")


def test_wrong_checksum_tries_all_mirrors_and_leaves_nothing(tmp_path, table, server):
    folder = tmp_path / "data"
    with pytest.raises(CmktError) as error:
        download(table("/good", "/norange", md5="0" * 32), ["speech"], folder)
    found = hashlib.md5(SPEECH).hexdigest()
    assert f"{server.address}/good: md5 {found}, expected {'0' * 32}" in str(error.value)
    assert f"{server.address}/norange: md5" in str(error.value)
    assert not [path for path in folder.iterdir() if "speech" in path.name]
    assert not (folder / "Corpus").exists()


def test_wrong_size_is_seen_before_anything_is_transferred(tmp_path, table, server):
    with pytest.raises(CmktError, match=f"{len(SPEECH)} bytes, expected 12"):
        download(table("/good", size=12), ["speech"], tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_without_network_the_message_says_what_to_do_by_hand(tmp_path, table):
    folder = tmp_path / "data"
    dead = ["http://127.0.0.1:9/a", "http://127.0.0.1:9/b"]
    with pytest.raises(CmktError) as error:
        download(table(*dead), ["speech"], folder)
    message = str(error.value)
    assert "\n" not in message and str(folder / "speech.tar.gz") in message
    assert all(f"{url}: " in message for url in dead) and "refused" in message
    assert "fetch the file there by hand" in message
    # ... and that is enough.
    (folder / "speech.tar.gz").write_bytes(SPEECH)
    download(table(*dead), ["speech"], folder)
    check_whole(folder)


@pytest.mark.parametrize(
    "known, what", [({}, f"1000 bytes, expected {len(SPEECH)}"),
                    ({"size": None}, "md5"),
                    ({"size": None, "md5": None}, "cannot be unpacked, perhaps not whole")]
)  # fmt: skip
def test_half_archive_by_hand_is_recognised(tmp_path, table, server, known, what):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "speech.tar.gz").write_bytes(SPEECH[:1000])
    with pytest.raises(CmktError, match=what) as error:
        download(table("/good", **known), ["speech"], folder)
    assert str(error.value).startswith(f"{folder / 'speech.tar.gz'}: ")
    assert not (folder / "Corpus").exists() and server.requests == []


def test_killed_while_unpacking_is_not_taken_for_whole(tmp_path, table, server):
    folder = tmp_path / "data"
    archives = table("/good")
    code = f"""
import os, tarfile
from pathlib import Path
from cmkt.corpus.download import download
extract = tarfile.TarFile.extract
def killed(self, member, *args, **kwargs):
    extract(self, member, *args, **kwargs)
    if member.name.endswith("a.wav"):
        os.kill(os.getpid(), 9)
tarfile.TarFile.extract = killed
download(Path({str(archives)!r}), ["speech"], Path({str(folder)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert not (folder / "Corpus").exists()
    download(archives, ["speech"], folder)
    check_whole(folder)
    assert len(server.requests) == 1  # the archive was whole


def test_tree_from_elsewhere_is_neither_trusted_nor_overwritten(tmp_path, table, server):
    folder = tmp_path / "data"
    (folder / "Corpus/part").mkdir(parents=True)
    (folder / "Corpus/part/a.wav").write_bytes(b"mine")
    with pytest.raises(CmktError, match="may not be whole.*--corpus_dir"):
        download(table("/good"), ["speech"], folder)
    assert (folder / "Corpus/part/a.wav").read_bytes() == b"mine" and server.requests == []


def test_archives_of_one_corpus_share_its_folder(tmp_path, table, server):
    folder = tmp_path / "data"
    (folder / "Corpus/other").mkdir(parents=True)
    (folder / "Corpus/other/c.wav").write_bytes(b"c")
    download(table("/good"), ["speech"], folder)
    check_whole(folder)
    assert (folder / "Corpus/other/c.wav").read_bytes() == b"c"


def test_nested_archives_are_unpacked_where_they_lie(tmp_path, table, server):
    inner = tar({"train/S1/a.wav": b"a"})
    server.content = tar({"Corpus/part/wav/S1.tar.gz": inner, "Corpus/part/text": b"t"})
    options = {"size": None, "md5": None, "nested": "wav/*.tar.gz"}
    download(table("/good", **options), ["speech"], tmp_path / "data")
    part = tmp_path / "data/Corpus/part"
    assert (part / "wav/train/S1/a.wav").read_bytes() == b"a"
    assert not list(part.rglob("*.tar.gz"))


def test_zip(tmp_path, table, server):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("Corpus/part/a.wav", NOISE)
    server.content = stream.getvalue()
    digest = hashlib.sha256(server.content).hexdigest()
    options = {"file": "speech.zip", "size": None, "md5": None, "sha256": digest}
    download(table("/good", **options), ["speech"], tmp_path / "data")
    assert (tmp_path / "data/Corpus/part/a.wav").read_bytes() == NOISE


def test_members_cannot_leave_the_folder(tmp_path, table, server):
    server.content = tar({"Corpus/part/a.wav": b"a", "../../evil": b"e"})
    with pytest.raises(CmktError, match="cannot be unpacked.*outside"):
        download(table("/good", size=None, md5=None), ["speech"], tmp_path / "data")
    assert not list(tmp_path.rglob("evil")) and not (tmp_path / "data/Corpus").exists()


def test_too_small_disk_is_seen_before_any_work(tmp_path, table, server):
    with pytest.raises(CmktError, match="needs 2000000.0 GB"):
        download(table("/good", size=10**15), ["speech"], tmp_path / "data")
    assert server.requests == []


def test_unknown_archive_and_unknown_key(tmp_path, table):
    with pytest.raises(CmktError, match="no archive text .there are speech"):
        download(table("/good"), ["text"], tmp_path / "data")
    with pytest.raises(CmktError, match="archives.yaml: speech: .*sha1"):
        download(table("/good", sha1="0"), ["speech"], tmp_path / "data")


def test_stage_1_of_a_recipe_downloads_and_then_finds_the_corpus(
    tmp_path, table, server, monkeypatch, capsys
):
    roots = []
    corpus = Corpus("Corpus", "nowhere", "Corpus/part", "part/*.wav", table("/good"))
    options = ["--data_dir", str(tmp_path / "data"), "--download_dir", str(tmp_path / "disk")]
    monkeypatch.setattr(sys, "argv", ["data.sh", *options])

    def read_sets(root, args):
        roots.append(root)
        return {}

    assert run_recipe(corpus, read_sets, "", needed=lambda args: ["speech"]) == 0
    assert roots == [tmp_path / "disk" / "Corpus"]


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("egs/*/archives.yaml")), ids=str)
def test_table_of_each_recipe_is_well_formed(path):
    for name, archive in read_archives(path).items():
        assert archive.urls, name
        assert all(url.startswith(("https://", "http://")) for url in archive.urls), name
        assert Path(archive.file).name == archive.file, name
        assert not Path(archive.unpacks).is_absolute() and ".." not in archive.unpacks, name
        assert archive.size is None or archive.size > 1000, name
        for digest, length in ((archive.md5, 32), (archive.sha256, 64)):
            assert digest is None or (len(digest) == length and int(digest, 16) >= 0), name
