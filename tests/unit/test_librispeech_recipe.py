"""Data preparation of egs/librispeech, run as the recipe runs it."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import prepare_corpus

from cmkt.corpus.datadir import DataDirectory

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "librispeech"


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "disk" / "LibriSpeech"
    for index, subset in enumerate(("train-clean-100", "dev-clean", "test-clean", "test-other")):
        speaker, chapter = str(10 + index), "7"
        folder = root / subset / speaker / chapter
        folder.mkdir(parents=True)
        names = [f"{speaker}-{chapter}-{number:04d}" for number in range(3)]
        for name in names:
            soundfile.write(folder / f"{name}.flac", np.zeros(160), 16000)
        text = "".join(f"{name} HELLO THERE\n" for name in names[:2])
        (folder / f"{speaker}-{chapter}.trans.txt").write_text(text)
    return root


def prepare(cwd, corpus_dir, *more):
    return prepare_corpus("librispeech", cwd, corpus_dir, *more)


def test_sets_hold_all_utterances_and_the_transcripts_there_are(tmp_path, corpus):
    # The folder itself, the one it lies in, a subset, and a speaker.
    subset = corpus / "train-clean-100"
    for corpus_dir in (corpus, corpus.parent, subset, subset / "10"):
        done = prepare(tmp_path, corpus_dir)
        assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert made == ["test_clean", "test_other", "train", "valid"]
    data = DataDirectory.read(tmp_path / "data" / "train")
    assert list(data.wav) == ["10-7-0000", "10-7-0001", "10-7-0002"]
    assert set(data.utt2spk.values()) == {"10"}
    assert data.text == {"10-7-0000": "HELLO THERE", "10-7-0001": "HELLO THERE"}
    assert all(Path(path).is_absolute() and Path(path).exists() for path in data.wav.values())


def test_second_run_does_nothing_and_a_change_redoes_only_its_set(tmp_path, corpus):
    def times():
        return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("data/*/wav.scp")}

    prepare(tmp_path, corpus)
    before = times()
    prepare(tmp_path, corpus)
    assert times() == before
    soundfile.write(corpus / "dev-clean/11/7/11-7-0003.flac", np.zeros(160), 16000)
    assert prepare(tmp_path, corpus).returncode == 0
    assert {name for name, time in times().items() if time != before[name]} == {"valid"}


def test_subsets_are_options(tmp_path, corpus):
    options = "--train_subsets train-clean-100 test-other --valid_subsets dev-clean"
    done = prepare(tmp_path, corpus, *options.split(), "--test_subsets", "test-clean")
    assert done.returncode == 0, done.stderr
    assert len(DataDirectory.read(tmp_path / "data" / "train").wav) == 6
    assert not (tmp_path / "data" / "test_other").exists()


@pytest.mark.parametrize(
    "corpus_dir, what", [("", "give --corpus_dir"), ("none", "no such corpus folder")]
)
def test_missing_corpus_tells_source_size_and_tree(tmp_path, corpus_dir, what):
    done = prepare(tmp_path, corpus_dir)
    assert done.returncode == 1
    first = done.stderr.splitlines()[0]
    assert first.startswith("local/data.sh: error: ") and what in first
    for word in ("openslr.org/12", "CC BY 4.0", "train-clean-100/  (6.4 GB", ".trans.txt"):
        assert word in done.stderr
    assert not (tmp_path / "data").exists()


def test_folder_of_something_else_is_refused(tmp_path, corpus):
    (tmp_path / "music").mkdir()
    done = prepare(tmp_path, tmp_path / "music")
    assert done.returncode == 1
    assert "not LibriSpeech: nothing matches" in done.stderr.splitlines()[0]


@pytest.mark.parametrize("empty", [False, True])
def test_missing_subset_is_named_before_any_set_is_made(tmp_path, corpus, empty):
    (corpus / "test-other").rename(tmp_path / "elsewhere")
    if empty:
        (corpus / "test-other").mkdir()
    done = prepare(tmp_path, corpus)
    assert done.returncode == 1
    what = "no <speaker>/<chapter>/*.flac" if empty else "no such LibriSpeech subset"
    assert f"{corpus / 'test-other'}: {what}" in done.stderr.splitlines()[0]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "options, what",
    [
        ("--train_subsets train-clean-100 train-clean-100", "10-7-0000 is also"),
        ("--train_subsets train-clean-100 dev-clean", "is in train and in valid"),
    ],
)
def test_subset_given_twice_is_refused(tmp_path, corpus, options, what):
    done = prepare(tmp_path, corpus, *options.split())
    assert done.returncode == 1 and what in done.stderr
    assert not (tmp_path / "data").exists()


def test_file_in_the_folder_of_another_speaker_is_refused(tmp_path, corpus):
    path = corpus / "train-clean-100/10/7/99-7-0000.flac"
    soundfile.write(path, np.zeros(160), 16000)
    done = prepare(tmp_path, corpus)
    assert done.returncode == 1 and f"{path}: not an utterance of speaker 10" in done.stderr


@pytest.mark.parametrize(
    "line, what",
    [(b"10-7-0009 WHO\n", "unknown utterance 10-7-0009"), (b"10-7-0002 \xe9\n", "not UTF-8")],
)
def test_bad_transcript_is_one_line_with_file_and_line(tmp_path, corpus, line, what):
    path = corpus / "train-clean-100/10/7/10-7.trans.txt"
    path.write_bytes(path.read_bytes() + line)
    done = prepare(tmp_path, corpus)
    assert done.returncode == 1
    assert f"{path}:3: " in done.stderr and what in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data" / "train").exists()
