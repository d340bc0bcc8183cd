"""The embedded corpus: disjoint sets, the same samples every time, sane audio."""

import ctypes
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cmkt.corpus.datadir import DataDirectory

pytest.importorskip("espeakng_loader")
LOCAL = Path(__file__).resolve().parents[2] / "egs" / "mini" / "local"
SMALL = ["--train_utterances", "18", "--valid_utterances", "4", "--test_utterances", "4"]
SMALL += ["--noise_minutes", "0.1"]
SAID = {"en": "the cat slept on the sofa", "zh": "猫在沙发上睡了整整一个下午"}
# Prints the phonemes of each line that it reads, as espeak-ng's Mandarin reads it.
PHONEMES = """
import ctypes, sys, espeakng_loader
library = ctypes.CDLL(espeakng_loader.get_library_path())
library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
library.espeak_SetVoiceByName(b"cmn")
library.espeak_TextToPhonemes.restype = ctypes.c_char_p
for line in sys.stdin.buffer:
    rest, phonemes = ctypes.c_char_p(line.strip()), b""
    while rest.value:
        phonemes += library.espeak_TextToPhonemes(ctypes.byref(rest), 1, 0)
    print(phonemes.decode())
"""


@pytest.fixture(scope="module", autouse=True)
def local_modules():
    """Make the recipe's own modules importable, for this file only."""
    sys.path.insert(0, str(LOCAL))
    yield
    sys.path.remove(str(LOCAL))


def command(*options) -> list[str]:
    return [str(LOCAL / "data.sh"), "--corpus_dir", "", "--data_dir", "data", *options]


def environment() -> dict:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def make(folder: Path, *options) -> None:
    done = subprocess.run(
        command(*options), cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def main(monkeypatch):
    """Return a function that runs the command line in this process."""
    import synthesise

    def call(folder: Path, *options) -> int:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", command(*options))
        return synthesise.main()

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.flac")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    make(folder, *SMALL, "--nj", "1")
    return folder


@pytest.fixture(scope="module")
def mandarin(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini_zh")
    make(folder, *SMALL, "--lang", "zh", "--nj", "1")
    return folder


@pytest.mark.parametrize("lang", SAID)
def test_voices_are_many_different_and_disjoint(lang):
    from espeak import synthesise
    from voices import speakers

    groups = speakers(lang)
    everyone = [speaker for group in groups.values() for speaker in group]
    assert len(groups["train"]) >= 12
    variants = [speaker.voice.split("+")[-1] for speaker in everyone]
    assert len(set(variants)) == len({speaker.name for speaker in everyone}) == len(everyone)

    def spectrum(speaker):
        power = np.abs(np.fft.rfft(synthesise(SAID[lang], speaker), 2**16)) ** 2
        level = 10 * np.log10(power[1:].reshape(64, -1).mean(axis=1))
        return level - level.mean()

    spectra = np.stack([spectrum(speaker) for speaker in groups["train"] + groups["test"]])
    distance = np.sqrt(((spectra[:, None] - spectra[None]) ** 2).mean(axis=-1))
    assert distance[np.triu_indices(len(spectra), 1)].min() > 1.0  # dB


@pytest.mark.parametrize(
    ("lang", "text"),
    [
        ("en", "both reporters question the nervous driver outside the prison"),
        ("zh", "两名记者昨天在监狱外面询问了紧张的司机"),
    ],
    ids=["en", "zh"],
)
def test_no_voice_saturates_and_none_depends_on_what_was_said_before(lang, text):
    from espeak import synthesise
    from voices import speakers

    everyone = [speaker for group in speakers(lang).values() for speaker in group]
    first = [synthesise(text, speaker) for speaker in everyone]
    ctypes.CDLL(None).srand(7)  # some voices draw from the C library
    second = [synthesise(text, speaker) for speaker in reversed(everyone)][::-1]
    for speaker, one, two in zip(everyone, first, second, strict=True):
        assert np.array_equal(one, two), speaker
        assert 0.02 < np.abs(one).max() < 0.9, speaker


def test_sentences_are_many_disjoint_and_agree():
    from sentences import split_sentences
    from sentences_en import SCENES

    counts = {"test": 30, "valid": 60, "train": 900}
    split = split_sentences(counts, seed=0)
    assert len(set(split["train"])) == 900
    assert sum(counts.values()) == len(set().union(*split.values()))
    assert all(s.replace(" ", "").isalpha() and s.islower() for g in split.values() for s in g)
    assert split_sentences(counts, seed=1) != split == split_sentences(counts, seed=0)
    more = split_sentences({**counts, "train": 400}, seed=0)
    assert more["test"] == split["test"] and more["valid"] == split["valid"]
    plurals = [person for scene in SCENES for person in scene[1]]
    thirds = [action.split()[1] for scene in SCENES for action in scene[2]]
    for sentence in split["train"]:
        for plural in plurals:
            assert not any(f"{plural} {third} " in f"{sentence} " for third in thirds), sentence


def test_mandarin_sentences_are_many_and_no_deed_is_told_twice():
    from sentences import split_sentences
    from sentences_zh import SCENES, WRITTEN

    counts = {"test": 30, "valid": 60, "train": 1350}
    split = split_sentences(counts, seed=0, lang="zh")
    texts = [text for group in split.values() for text in group]
    assert len(set(texts)) == 1440
    assert all(re.fullmatch("[一-鿿]{8,30}", text) for text in texts)  # no spaces, no points
    assert split_sentences(counts, seed=1, lang="zh") != split
    deeds = []
    for text in set(texts) - set(WRITTEN):
        people, actions, things = zip(*(
            (max((p for p in people if p in text), key=len, default=""), action, thing)
            for people, actions, things, _ in SCENES for action in actions for thing in things
            if text.endswith((action + thing, f"{action}了{thing}"))
        ), strict=True)  # fmt: skip
        assert all(people) and len(actions) == 1, text
        deeds.append((people[0], actions[0], things[0]))
    assert len(set(deeds)) == len(deeds) > 1400


def test_mandarin_aspect_agrees_with_the_time():
    import random

    from sentences_zh import from_grammar

    signs = {"past": "昨天|早上|去年|上个月|两天前|刚才", "habit": "每|夏天|平时|周末",
             "future": "明天|下个星期|以后|之前", "now": "现在|眼下|此刻"}  # fmt: skip
    verbs = {"past": "了", "habit": "都|常常", "future": "会", "now": "正在"}
    seen = set()
    for text in from_grammar(random.Random(0)):
        matching = [tense for tense, sign in signs.items() if re.search(sign, text)]
        assert len(matching) == 1, text
        (tense,) = matching
        assert re.search(verbs[tense], text), text
        assert (tense == "past") == ("了" in text), text
        assert "正在在" not in text and "在在" not in text
        seen.add(tense)
    assert seen == signs.keys()


def test_espeak_reads_each_character_of_a_mandarin_sentence_as_one_syllable():
    from sentences import all_sentences

    texts = all_sentences(0, "zh")
    lines = "\n".join([*texts, "A"]).encode()
    done = subprocess.run([sys.executable, "-c", PHONEMES], input=lines, capture_output=True)
    *readings, letter = done.stdout.decode().splitlines()
    assert "(en)" in letter  # how it reads what its dictionary lacks
    for text, reading in zip(texts, readings, strict=True):
        assert "(" not in reading and len(re.findall("[0-9]+", reading)) == len(text), text


def test_the_mandarin_corpus_is_sane(mandarin, corpus, monkeypatch):
    monkeypatch.chdir(mandarin)
    texts, recordings = [], list(contents(mandarin).values())
    assert len(set(recordings)) == len(recordings)
    for name, count in (("train", 18), ("valid", 4), ("test", 4)):
        data = DataDirectory.read(f"data/{name}")
        assert len(data.wav) == len(data.text) == count
        texts += data.text.values()
        for utterance, path in data.wav.items():
            audio, rate = soundfile.read(path)
            seconds = len(audio) / rate
            assert rate == 16000 and 1.2 < seconds < 8
            assert 2.5 < len(data.text[utterance]) / seconds < 8  # characters
            level = np.sqrt(np.mean(audio[: len(audio) // 160 * 160].reshape(-1, 160) ** 2, axis=1))
            assert np.mean(level > 0.02 * level.max()) > 0.7, path
    assert all(re.fullmatch("[一-鿿]+", text) for text in texts) and len(set(texts)) == len(texts)
    babble = Path("data/noise/train/babble-train-00.flac")
    assert babble.read_bytes() != (corpus / babble).read_bytes()


def test_another_language_in_one_folder_replaces_the_corpus(corpus, mandarin, main, tmp_path):
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    assert main(tmp_path, *SMALL, "--lang", "zh", "--nj", "2") == 0
    assert contents(tmp_path) == contents(mandarin)
    text = Path("data/train/text")
    assert (tmp_path / text).read_bytes() == (mandarin / text).read_bytes()


def test_sets_are_valid_and_the_audio_is_sane(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    texts = []
    for name, count, speakers in (("train", 18, 16), ("valid", 4, 4), ("test", 4, 4)):
        data = DataDirectory.read(f"data/{name}")
        assert len(data.wav) == len(data.text) == count
        assert len(set(data.utt2spk.values())) == speakers
        texts += data.text.values()
        for path in data.wav.values():
            audio, rate = soundfile.read(path)
            assert rate == 16000 and audio.ndim == 1 and np.isfinite(audio).all()
            assert 1.5 < len(audio) / rate < 6
            level = 10 * np.log10(np.mean(audio**2))
            assert -32.1 < level < -19.9 and np.abs(audio).max() < 0.91
    assert len(set(texts)) == len(texts)


def test_noise_families(corpus):
    families = {}
    for name in ("train", "valid", "test"):
        paths = sorted((corpus / "data" / "noise" / name).glob("*.flac"))
        families[name] = {path.name.split("-")[0] for path in paths}
        for path in paths:
            audio, rate = soundfile.read(path)
            assert rate == 16000 and len(audio) == 20 * rate
            assert audio.std() > 0.01 and np.abs(audio).max() < 0.91
    assert families["train"] == {"babble", "coloured", "modulated", "hum", "clicks"}
    assert families["valid"] == families["train"]
    assert families["test"] - families["train"] == {"machine", "wind"}
    recordings = [v for k, v in contents(corpus / "data").items() if k.startswith("noise")]
    assert len(set(recordings)) == len(recordings) == 13


def test_a_killed_run_with_more_jobs_ends_with_the_same_bytes(corpus, tmp_path):
    killed = subprocess.Popen(
        command(*SMALL, "--nj", "2"),
        cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not contents(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "data" / "train").exists()
    make(tmp_path, *SMALL, "--nj", "2")
    assert contents(tmp_path) == contents(corpus)
    tables = sorted((corpus / "data").glob("*/*2*")) + sorted((corpus / "data").glob("*/*.scp"))
    assert len(tables) == 9
    for table in tables:
        assert (tmp_path / table.relative_to(corpus)).read_bytes() == table.read_bytes()
    assert not list(tmp_path.rglob(".*.tmp")) and not list(tmp_path.rglob(".*.work"))


def test_a_second_run_does_nothing(corpus, main, caplog):
    caplog.set_level(logging.INFO)
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert main(corpus, *SMALL, "--nj", "2") == 0
    assert caplog.text.count("up to date") == 6
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_another_seed_gives_other_samples(corpus, main, tmp_path):
    assert main(tmp_path, *SMALL, "--nj", "2", "--seed", "1") == 0
    ours, other = contents(corpus), contents(tmp_path)
    assert ours.keys() == other.keys()
    assert all(ours[name] != other[name] for name in ours)


def test_bad_input_is_named_before_anything_is_made(main, tmp_path, monkeypatch, capsys):
    assert main(tmp_path, "--train_utterances", "5000") == 1
    assert "ask for fewer utterances" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(tmp_path, "--noise_minutes", "0")
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # as if not installed
    assert main(tmp_path, *SMALL) == 1
    assert "pip install 'cmkt[mini]'" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
