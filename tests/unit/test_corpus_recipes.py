"""Data preparation of four recipes, run as the recipes run it on tiny trees in the true layout."""

import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import prepare_corpus, run_command

from cmkt.corpus.audio import read_audio
from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.download import read_archives
from cmkt.corpus.mix import mix

EGS = Path(__file__).resolve().parents[2] / "egs"
LENGTH = 4800  # samples


def samples_of(path):
    """Return what an utterance sounds like: each differently, noisy and clean alike."""
    rng = np.random.default_rng(zlib.crc32(Path(path).stem.encode()))
    return np.round(rng.normal(0, 3000, LENGTH)).astype(np.int16)


def write_wav(path, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples_of(path), rate, format="WAV")


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


def make_aishell1(disk):
    root, lines = disk / "data_aishell", []
    for side, speaker in (("train", "S0002"), ("train", "S0003"), ("dev", "S0724"),
                          ("test", "S0764")):  # fmt: skip
        for number in (122, 121):
            utterance = f"BAC009{speaker}W0{number}"
            write_wav(root / "wav" / side / speaker / f"{utterance}.wav")
            lines.append(f"{utterance} 而 对 楼市\n")
    del lines[0]  # an utterance without a transcript
    lines.append("BAC009S0901W0121 没有 声音\n")  # a transcript without audio
    write(root / "transcript" / "aishell_transcript_v0.8.txt", "".join(lines))
    return root


def make_thchs30(disk):
    root = disk / "data_thchs30"
    for side, name in (("train", "A11_0"), ("train", "B2_251"), ("dev", "A11_7"),
                       ("test", "D4_750")):  # fmt: skip
        write_wav(root / "data" / f"{name}.wav")
        write(root / "data" / f"{name}.wav.trn", "绿 是 阳春\nlv4 shi4 yang2 chun1\nl v4 sh ix4\n")
        (root / side).mkdir(exist_ok=True)
        (root / side / f"{name}.wav").symlink_to(f"../data/{name}.wav")
        write(root / side / f"{name}.wav.trn", f"../data/{name}.wav.trn\n")
    return root


def make_voicebank_demand(disk):
    sides = {
        "trainset_28spk": ("p226", "p227", "p287"),
        "trainset_56spk": ("p234", "p241", "p294"),
        "testset": ("p232",),
    }
    for side, speakers in sides.items():
        log = ""
        for speaker in speakers:
            for number in (1, 2):
                name = f"{speaker}_00{number}"
                write_wav(disk / f"noisy_{side}_wav" / f"{name}.wav", 48000)
                write_wav(disk / f"clean_{side}_wav" / f"{name}.wav", 48000)
                write(disk / f"{side}_txt" / f"{name}.txt", "Please call Stella.\n")
                log += f"{name} bus 2.5\n"
        write(disk / f"log_{side}.txt", log)
    (disk / "trainset_28spk_txt" / "p227_002.txt").unlink()
    write(disk / "clean_trainset_28spk_wav" / "._p226_001.wav", "left by another system")
    return disk


def make_speechocean762(disk):
    root = disk / "speechocean762"
    for side, speakers in (("train", ("0001", "0003", "0005")), ("test", ("0024",))):
        tables = {"wav.scp": "", "utt2spk": "", "text": ""}
        for speaker in speakers:
            for number in ("0011", "0035"):
                utterance = f"0{speaker}{number}"
                wav = f"WAVE/SPEAKER{speaker}/{utterance}.WAV"
                write_wav(root / wav)
                for name, value in zip(tables, (wav, speaker, "IT'S GOOD"), strict=True):
                    tables[name] += f"{utterance}\t{value}\n"
        for name, lines in tables.items():
            write(root / side / name, lines)
    return root


MAKERS = {
    "aishell1": make_aishell1,
    "thchs30": make_thchs30,
    "voicebank_demand": make_voicebank_demand,
    "speechocean762": make_speechocean762,
}


@pytest.fixture
def disk(tmp_path):
    return tmp_path / "my disk" / "语料"


def prepared(recipe, cwd, corpus_dir, *more):
    done = prepare_corpus(recipe, cwd, corpus_dir, *more)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (cwd / "data").iterdir()) == ["test", "train", "valid"]
    return {name: DataDirectory.read(cwd / "data" / name) for name in ("train", "valid", "test")}


def refused(recipe, cwd, corpus_dir, *more):
    """Return the one-line error of a run that has written nothing."""
    done = prepare_corpus(recipe, cwd, corpus_dir, *more)
    assert done.returncode == 1, done.stdout + done.stderr
    assert not (cwd / "data").exists()
    first, *tree = done.stderr.splitlines()
    assert first.startswith("local/data.sh: error: ")
    assert not tree or "Expected:" in tree[0], done.stderr
    return first


def speakers(data):
    return {name: set(part.utt2spk.values()) for name, part in data.items()}


@pytest.mark.parametrize("recipe", MAKERS)
def test_audio_is_read_and_a_second_run_does_nothing(recipe, tmp_path, disk):
    root = MAKERS[recipe](disk)
    for data in prepared(recipe, tmp_path, root).values():
        for utterance, path in data.wav.items():
            assert Path(path).stem == utterance and Path(path).is_absolute()
            assert (read_audio(path)[0] * 32768 == samples_of(path)).all()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    prepared(recipe, tmp_path, root)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


@pytest.mark.parametrize(
    "recipe, path",
    [
        ("aishell1", ".."),
        ("aishell1", "wav"),
        ("aishell1", "wav/train/S0002"),
        ("thchs30", ".."),
        ("thchs30", "data"),
        ("thchs30", "train"),
        ("voicebank_demand", ".."),
        ("voicebank_demand", "noisy_testset_wav"),
        ("speechocean762", "../.."),
        ("speechocean762", "WAVE/SPEAKER0001"),
    ],
)
def test_tree_is_found_from_above_and_below(recipe, path, tmp_path, disk):
    data = prepared(recipe, tmp_path, MAKERS[recipe](disk) / path)
    assert len(data["test"].wav) == {"thchs30": 1}.get(recipe, 2)


@pytest.mark.parametrize("recipe", MAKERS)
def test_folder_of_something_else_is_refused(recipe, tmp_path):
    (tmp_path / "music").mkdir()
    assert "nothing matches" in refused(recipe, tmp_path, tmp_path / "music")


@pytest.mark.parametrize("recipe", MAKERS)
def test_unpacked_downloads_are_found_without_a_network(recipe, tmp_path, disk):
    MAKERS[recipe](disk)
    archives = read_archives(EGS / recipe / "archives.yaml")
    for archive in archives.values():
        if (disk / archive.unpacks).exists():
            (disk / f".{archive.file}.unpacked").touch()
    prepared(recipe, tmp_path, "", "--download_dir", disk)


@pytest.mark.parametrize("recipe", MAKERS)
def test_stage_1_with_the_check_of_the_data(recipe, tmp_path, disk):
    root = MAKERS[recipe](disk)
    options = ["--corpus_dir", root, "--data_dir", tmp_path / "data", "--nj", "1"]
    done = run_command(tmp_path, EGS / recipe / "run.sh", *options, "--stop_stage", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "data" / "validate" / "report.txt").exists()


def test_voicebank_demand_is_scored_as_papers_do(tmp_path):
    done = run_command(tmp_path, EGS / "voicebank_demand" / "run.sh", "--dry_run")
    assert "--metrics pesq,csig,cbak,covl,segsnr,stoi" in done.stdout


def test_aishell1_sets_speakers_and_texts(tmp_path, disk):
    root = make_aishell1(disk)
    data = prepared("aishell1", tmp_path, root, "--lang", "zh")
    assert speakers(data) == {
        "train": {"S0002", "S0003"}, "valid": {"S0724"}, "test": {"S0764"},
    }  # fmt: skip
    assert len(data["train"].wav) == 4 and "BAC009S0002W0122" not in data["train"].text
    assert data["train"].text["BAC009S0002W0121"] == "而 对 楼市"
    notes = prepare_corpus("aishell1", tmp_path, root).stdout
    assert "train has 2 of AISHELL-1's 340 speakers" in notes
    assert "1 transcripts without audio" in notes


def test_aishell1_other_version_of_the_transcripts(tmp_path, disk):
    root = make_aishell1(disk)
    path = root / "transcript" / "aishell_transcript_v0.8.txt"
    path.rename(path.with_name("aishell_transcript_v0.7.txt"))
    error = refused("aishell1", tmp_path, root)
    assert "want aishell_transcript_v0.8.txt, found aishell_transcript_v0.7.txt" in error
    shutil.rmtree(root / "transcript")
    assert "found no transcript" in refused("aishell1", tmp_path, root)


@pytest.mark.parametrize(
    "lines, encoding, what",
    [
        ("BAC009S0002W0121 A\nBAC009S0002W0122 而 对\n", "gbk", ":2: not UTF-8 text, perhaps GBK"),
        ("BAC009S0002W0121 A\nBAC009S0002W0121 B\n", "utf-8", ":2: utterance BAC009S0002W0121"),
    ],
)
def test_aishell1_bad_transcript_names_file_line_and_remedy(tmp_path, disk, lines, encoding, what):
    root = make_aishell1(disk)
    path = root / "transcript" / "aishell_transcript_v0.8.txt"
    write(path, lines, encoding)
    error = refused("aishell1", tmp_path, root)
    assert f"{path}{what}" in error and ("iconv -f GBK" in error) == (encoding == "gbk")


def test_aishell1_half_a_corpus(tmp_path, disk):
    root = make_aishell1(disk)
    write(root / "wav" / "S0005.tar.gz", "")
    error = refused("aishell1", tmp_path, root)
    assert f"{root}/wav/S0005.tar.gz: 1 speakers are not unpacked" in error and "tar xzf" in error
    (root / "wav" / "S0005.tar.gz").rename(root / "wav" / "S0002.tar.gz")  # kept after unpacking
    shutil.rmtree(root / "wav" / "dev")
    assert "no utterances for the set valid" in refused("aishell1", tmp_path, root)


def test_aishell1_file_in_the_folder_of_another_speaker(tmp_path, disk):
    path = make_aishell1(disk) / "wav" / "train" / "S0003" / "BAC009S0002W0300.wav"
    write_wav(path)
    assert f"{path}: not an utterance of speaker S0003" in refused("aishell1", tmp_path, disk)


def test_thchs30_sets_speakers_and_texts(tmp_path, disk):
    root = make_thchs30(disk)
    (root / "data" / "B2_251.wav.trn").unlink()
    data = prepared("thchs30", tmp_path, root, "--lang", "zh")
    assert speakers(data) == {"train": {"A11", "B2"}, "valid": {"A11"}, "test": {"D4"}}
    assert data["train"].text == {"A11_0": "绿 是 阳春"}
    assert data["valid"].text == {"A11_7": "绿 是 阳春"}


def test_thchs30_file_systems_without_links(tmp_path, disk):
    root = make_thchs30(disk)
    for link in root.glob("train/*.wav"):
        target = os.readlink(link)
        link.unlink()
        write(link, target)  # what is left of a link there
    data = prepared("thchs30", tmp_path, root)["train"]
    for path in data.wav.values():
        assert (read_audio(path)[0] * 32768 == samples_of(path)).all()


def test_thchs30_half_a_corpus(tmp_path, disk):
    root = make_thchs30(disk)
    (root / "data" / "D4_750.wav").unlink()
    assert "test/D4_750.wav: a link to a file" in refused("thchs30", tmp_path, root)
    shutil.rmtree(root / "test")
    assert "no utterances for the set test" in refused("thchs30", tmp_path, root)


def test_thchs30_wrong_encoding(tmp_path, disk):
    path = make_thchs30(disk) / "data" / "A11_0.wav.trn"
    write(path, "绿 是\nlv4 shi4\n", "gbk")
    assert f"{path}:1: not UTF-8 text, perhaps GBK" in refused("thchs30", tmp_path, disk)


def test_voicebank_demand_pairs_texts_and_conditions(tmp_path, disk):
    root = make_voicebank_demand(disk)
    data = prepared("voicebank_demand", tmp_path, root)
    assert speakers(data) == {"train": {"p227"}, "valid": {"p226", "p287"}, "test": {"p232"}}
    assert data["train"].text == {"p227_001": "Please call Stella."}
    for part in data.values():
        for utterance, path in part.wav.items():
            assert part.spk1[utterance] == path.replace("noisy_", "clean_")
    for name in ("train", "valid", "test"):
        folder = tmp_path / "data" / name
        conditions = (folder / "utt2noise").read_text() + (folder / "utt2snr").read_text()
        assert conditions.split() == [
            word for value in ("bus", "2.5") for key in sorted(data[name].wav)
            for word in (key, value)
        ]  # fmt: skip


def test_voicebank_demand_larger_training_set(tmp_path, disk):
    data = prepared("voicebank_demand", tmp_path, make_voicebank_demand(disk), "--speakers", 56)
    train, valid, test = speakers(data).values()
    assert train | valid == {"p234", "p241", "p294"} and not train & valid and test == {"p232"}


def test_voicebank_demand_is_copied_at_the_rate_of_the_model(tmp_path, disk, monkeypatch):
    prepared("voicebank_demand", tmp_path, make_voicebank_demand(disk))
    monkeypatch.chdir(tmp_path)
    mix("data/test", "dump/test", "", snr="-5:10", fs=16000, nj=1)
    data = DataDirectory.read("dump/test")
    for table in (data.wav, data.spk1):
        samples, rate = read_audio(table["p232_001"])
        assert rate == 16000 and len(samples) == LENGTH // 3
    assert Path("dump/test/utt2snr").read_text() == "p232_001 2.5\np232_002 2.5\n"


@pytest.mark.parametrize("kind, other", [("noisy", "clean"), ("clean", "noisy")])
def test_voicebank_demand_missing_partner(tmp_path, disk, kind, other):
    root = make_voicebank_demand(disk)
    (root / f"{other}_testset_wav" / "p232_002.wav").unlink()
    error = refused("voicebank_demand", tmp_path, root)
    assert f"{root}/{kind}_testset_wav/p232_002.wav: has no {other} partner" in error


def test_voicebank_demand_without_texts_and_logs(tmp_path, disk):
    root = make_voicebank_demand(disk)
    for path in (*root.glob("*_txt"), *root.glob("log_*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not prepared("voicebank_demand", tmp_path, root)["train"].text
    assert not (tmp_path / "data" / "train" / "utt2snr").exists()


@pytest.mark.parametrize(
    "log, what",
    [
        ("p232_001 bus 2.5\n", "lacks utterance p232_002"),
        ("p232_001 bus 2.5\np232_002 bus loud\n", ":2: not `<utterance> <noise> <SNR>`"),
    ],
)
def test_voicebank_demand_bad_log(tmp_path, disk, log, what):
    path = make_voicebank_demand(disk) / "log_testset.txt"
    write(path, log)
    error = refused("voicebank_demand", tmp_path, disk)
    assert str(path) in error and what in error


def test_voicebank_demand_half_a_corpus(tmp_path, disk):
    root = make_voicebank_demand(disk)
    shutil.rmtree(root / "clean_testset_wav")
    error = refused("voicebank_demand", tmp_path, root)
    assert f"{root}/clean_testset_wav: no such folder" in error


def test_speechocean762_sets_speakers_and_texts(tmp_path, disk):
    data = prepared("speechocean762", tmp_path, make_speechocean762(disk))
    train, valid, test = speakers(data).values()
    assert len(valid) == 1 and train | valid == {"0001", "0003", "0005"} and test == {"0024"}
    assert data["test"].text == {"000240011": "IT'S GOOD", "000240035": "IT'S GOOD"}


def test_speechocean762_half_a_corpus(tmp_path, disk):
    root = make_speechocean762(disk)
    (root / "WAVE/SPEAKER0003/000030035.WAV").unlink()
    error = refused("speechocean762", tmp_path, root)
    assert f"{root}/train/wav.scp:4: no audio of utterance 000030035" in error
    (root / "test" / "utt2spk").unlink()
    shutil.rmtree(root / "train")
    assert "train/wav.scp: no such file" in refused("speechocean762", tmp_path, root)


def test_speechocean762_text_of_an_unknown_utterance(tmp_path, disk):
    path = make_speechocean762(disk) / "test" / "text"
    write(path, "000990011\tWHO\n")
    error = refused("speechocean762", tmp_path, disk)
    assert f"{path}:1: utterance 000990011 is not in wav.scp" in error
