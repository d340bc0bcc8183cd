"""Data preparation of egs/an4, run as the recipe runs it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import prepare_corpus

from cmkt.corpus.audio import read_audio
from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.mix import mix

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "an4"
SPEAKERS = {"an4_clstk": ("fash", "fbbh", "mdcs2", "mwhw"), "an4test_clstk": ("fcaw", "miry")}
SAMPLES = (8000 * np.sin(np.arange(8000) / 10)).astype(np.int16)


def write_sphere(path):
    soundfile.write(path.with_suffix(".sph"), SAMPLES, 16000, format="NIST", subtype="PCM_16")


def write_raw(path):
    path.with_suffix(".raw").write_bytes(SAMPLES.astype(">i2").tobytes())


@pytest.fixture(params=[write_sphere, write_raw])
def corpus(tmp_path, request):
    """AN4 in its own layout: four training speakers, two of the test, two utterances each."""
    root = tmp_path / "disk" / "an4"
    (root / "etc").mkdir(parents=True)
    for folder, speakers in SPEAKERS.items():
        ids = [f"{name}-{speaker}-b" for speaker in speakers for name in ("an1", "cen2")]
        for name in ids:
            path = root / "wav" / folder / name.split("-")[1] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            request.param(path)
        side, form = "train", "<s> ENTER SIX TWO </s> ({})\n"
        if folder == "an4test_clstk":  # the official files differ in this
            side, form = "test", "ENTER SIX TWO ({})\n"
        text = "".join(form.format(name) for name in ids)
        (root / "etc" / f"an4_{side}.transcription").write_text(text)
    return root


def prepare(cwd, corpus_dir, *more):
    return prepare_corpus("an4", cwd, corpus_dir, *more)


def refused(tmp_path, corpus) -> str:
    done = prepare(tmp_path, corpus)
    assert done.returncode == 1 and not (tmp_path / "data").exists()
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_sets_speakers_texts_and_samples(tmp_path, corpus):
    done = prepare(tmp_path, corpus)
    assert done.returncode == 0, done.stderr
    sets = {n: DataDirectory.read(tmp_path / "data" / n) for n in ("train", "valid", "test")}
    assert {name: len(data.wav) for name, data in sets.items()} == {
        "train": 6,
        "valid": 2,
        "test": 4,
    }
    train, valid, test = (set(data.utt2spk.values()) for data in sets.values())
    assert len(train) == 3 and len(valid) == 1 and train | valid == set(SPEAKERS["an4_clstk"])
    assert test == set(SPEAKERS["an4test_clstk"])
    for data in sets.values():
        for name, path in data.wav.items():
            assert name.split("-")[1] == data.utt2spk[name]
            assert data.text[name] == "ENTER SIX TWO"
            samples, rate = read_audio(path)
            assert rate == 16000 and (samples * 32768 == SAMPLES).all()


@pytest.mark.parametrize("path", ["..", "wav", "wav/an4_clstk", "wav/an4_clstk/fash"])
def test_tree_is_found_from_above_and_below(tmp_path, corpus, path):
    done = prepare(tmp_path, corpus / path)
    assert done.returncode == 0, done.stderr
    assert len(DataDirectory.read(tmp_path / "data" / "train").wav) == 6


def test_prepared_sets_can_be_mixed(tmp_path, corpus, monkeypatch):
    prepare(tmp_path, corpus)
    (tmp_path / "noise").mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(tmp_path / "noise" / "a.wav", noise, 16000)
    monkeypatch.chdir(tmp_path)
    mix("data/test", "dump/test", "noise", snr="0", nj=1)
    assert len(DataDirectory.read("dump/test").wav) == 4


def test_second_run_does_nothing(tmp_path, corpus):
    prepare(tmp_path, corpus)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert prepare(tmp_path, corpus).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_utterance_without_transcript_stays(tmp_path, corpus):
    path = corpus / "etc/an4_test.transcription"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert prepare(tmp_path, corpus).returncode == 0
    data = DataDirectory.read(tmp_path / "data" / "test")
    assert len(data.wav) == 4 and "an1-fcaw-b" not in data.text


def test_missing_speaker_is_told_by_the_first_transcript_without_audio(tmp_path, corpus):
    shutil.rmtree(corpus / "wav/an4_clstk/fbbh")
    error = refused(tmp_path, corpus)
    assert f"{corpus}/etc/an4_train.transcription:3: no audio of utterance an1-fbbh-b" in error


def test_missing_transcription_file(tmp_path, corpus):
    (corpus / "etc/an4_test.transcription").unlink()
    assert "an4_test.transcription: no such transcription file" in refused(tmp_path, corpus)


@pytest.mark.parametrize(
    "line, what",
    [("<s> OUI É </s> (an1-fash-b)\n".encode("latin-1"), "not UTF-8"),
     (b"an1-fash-b YES\n", "not `<s> WORDS </s> (utterance)`")],
)  # fmt: skip
def test_bad_transcript_is_named_by_file_and_line(tmp_path, corpus, line, what):
    path = corpus / "etc/an4_train.transcription"
    path.write_bytes(path.read_bytes() + line)
    assert f"{path}:9: {what}" in refused(tmp_path, corpus)


def test_both_formats_side_by_side_are_refused(tmp_path, corpus):
    for write in (write_sphere, write_raw):
        write(corpus / "wav/an4_clstk/fash/an1-fash-b")
    assert "an1-fash-b is there with another extension" in refused(tmp_path, corpus)


def test_empty_side_shows_the_expected_tree(tmp_path, corpus):
    shutil.rmtree(corpus / "wav/an4test_clstk")
    (corpus / "etc/an4_test.transcription").write_text("")
    done = prepare(tmp_path, corpus)
    assert done.returncode == 1 and "no utterances for the set test" in done.stderr
    assert "an4test_clstk/<speaker>/<utterance>.sph" in done.stderr
