"""Stages: nothing done twice, nothing half done under a final name."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cmkt.stage import MARKER, Stage, atomic_file, fingerprint


def build(out: Path, source: Path, options: dict, log: list) -> None:
    stage = Stage(out, [source], options)
    if stage.is_done():
        return
    with stage.working_directory() as work:
        for name in ("a", "b"):
            if not (work / name).exists():
                log.append(name)
                with atomic_file(work / name) as stream:
                    stream.write(source.read_text() + str(options))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_text("x")
    return path


def test_same_command_does_nothing(tmp_path, source):
    log = []
    build(tmp_path / "out", source, {"k": 1}, log)
    build(tmp_path / "out", source, {"k": 1}, log)
    assert log == ["a", "b"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a", "b", MARKER}


def test_changed_option_or_input_does_it_again(tmp_path, source):
    log = []
    build(tmp_path / "out", source, {"k": 1}, log)
    build(tmp_path / "out", source, {"k": 2}, log)
    assert (tmp_path / "out" / "a").read_text() == "x{'k': 2}"
    source.write_text("y")
    build(tmp_path / "out", source, {"k": 2}, log)
    assert (tmp_path / "out" / "a").read_text() == "y{'k': 2}"
    assert log == ["a", "b"] * 3


def test_error_keeps_the_old_output(tmp_path, source):
    build(tmp_path / "out", source, {"k": 1}, [])
    with pytest.raises(ValueError), Stage(tmp_path / "out", [], {"k": 3}).working_directory():
        raise ValueError
    assert (tmp_path / "out" / "a").read_text() == "x{'k': 1}"


KILLED = """
import os, signal, sys
from pathlib import Path
from cmkt.stage import Stage, atomic_file
out, source = map(Path, sys.argv[1:])
with Stage(out, [source], {"k": 1}).working_directory() as work:
    with atomic_file(work / "a") as stream:
        stream.write("x{'k': 1}")
    with atomic_file(work / "b") as stream:
        stream.write("half")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_leaves_no_final_name_and_is_resumed(tmp_path, source):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(source)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    log = []
    build(out, source, {"k": 1}, log)
    assert log == ["b"]
    assert (out / "a").read_text() == (out / "b").read_text() == "x{'k': 1}"


def test_work_of_other_options_is_not_resumed(tmp_path, source):
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, str(out), str(source)], check=False)
    log = []
    build(out, source, {"k": 2}, log)
    assert log == ["a", "b"]


def test_atomic_file_keeps_the_old_content_on_error(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(OSError), atomic_file(path) as stream:
        stream.write("new")
        raise OSError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_fingerprint_of_a_folder_is_that_of_its_marker(tmp_path):
    before = fingerprint([tmp_path], {})
    (tmp_path / "unmarked").write_text("x")
    assert fingerprint([tmp_path], {}) == before
    (tmp_path / MARKER).write_text("{}")
    assert fingerprint([tmp_path], {}) != before
