"""Stage 1 of egs/folder and egs/kaldi_dir, run as the recipes run it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.kaldi import piped_file

EGS = Path(__file__).resolve().parents[2] / "egs"


def sound(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = {".mp3": "MP3", ".opus": "OGG"}.get(path.suffix)
    more = {"format": suffix, "subtype": {"OGG": "OPUS"}.get(suffix)} if suffix else {}
    # Numbered samples, so that a cut can be checked.
    soundfile.write(path, np.arange(int(16000 * seconds), dtype=np.int16), 16000, **more)
    return path


def prepare(recipe, cwd, corpus_dir, *more):
    environment = {**os.environ}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [EGS / recipe / "local" / "data.sh", "--corpus_dir", corpus_dir, *more]
    return subprocess.run(
        [*map(str, command), "--data_dir", "data"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def sets_in(folder):
    made = sorted(path.name for path in (folder / "data").iterdir() if path.name[0] != ".")
    return {name: DataDirectory.read(folder / "data" / name) for name in made}


def refused(done, folder, *words):
    assert done.returncode == 1, done.stdout + done.stderr
    # A progress bar may come before it.
    [line] = [s for s in done.stderr.splitlines() if s.startswith("local/data.sh: error: ")]
    for word in words:
        assert str(word) in line
    assert not (folder / "data").exists()


@pytest.fixture
def speech(tmp_path):
    """Ten speakers of two utterances in wav and flac, at two depths, some with a transcript."""
    for number in range(10):
        folder = tmp_path / "my speech" / f"spk{number}"
        sound(folder / "one.wav")
        sound(folder / "chapter 1" / "zwei é.flac")
        (folder / "one.txt").write_text(f"\ufeffwords of\n  speaker {number}\n")
    return tmp_path / "my speech"


def test_folder_is_split_by_speaker(tmp_path, speech):
    done = prepare("folder", tmp_path, speech)
    assert done.returncode == 0, done.stderr
    sets = sets_in(tmp_path)
    assert {name: len(data.wav) for name, data in sets.items()} == {
        "train": 16,
        "valid": 2,
        "test": 2,
    }
    speakers = [set(data.utt2spk.values()) for data in sets.values()]
    assert len(set.union(*speakers)) == sum(map(len, speakers)) == 10
    wav = {u: path for data in sets.values() for u, path in data.wav.items()}
    assert wav["spk3-one"] == str(speech / "spk3" / "one.wav")
    assert wav["spk3-chapter_1-zwei_é"] == str(speech / "spk3" / "chapter 1" / "zwei é.flac")
    text = {u: line for data in sets.values() for u, line in data.text.items()}
    assert len(text) == 10 and text["spk3-one"] == "words of speaker 3"
    assert "10 speakers by their folders" in done.stdout


def test_same_command_does_nothing_and_a_new_transcript_counts(tmp_path, speech):
    def times():
        return {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("data/*/wav.scp")}

    prepare("folder", tmp_path, speech)
    before = times()
    prepare("folder", tmp_path, speech)
    assert times() == before
    [utterance] = [u for u in sets_in(tmp_path)["test"].text]
    (speech / utterance.split("-")[0] / "one.txt").write_text("something else")
    assert prepare("folder", tmp_path, speech).returncode == 0
    assert {name for name, time in times().items() if time != before[name]} == {"test"}
    assert sets_in(tmp_path)["test"].text == {utterance: "something else"}


def test_folders_of_sets_are_official_and_a_missing_one_comes_from_train(tmp_path):
    root = tmp_path / "corpus" / "wav"  # one folder holds all
    for number in range(4):
        sound(root / "Train" / f"s{number}" / "001.wav")
    sound(root / "test" / "s9" / "001.wav")
    sound(root / "extra" / "x.wav")
    done = prepare("folder", tmp_path, root.parent)
    assert done.returncode == 0, done.stderr
    sets = sets_in(tmp_path)
    assert list(sets["test"].wav) == ["s9-wav-test-001"]
    assert len(sets["valid"].wav) == 1 and len(sets["train"].wav) == 3
    assert set(sets["valid"].utt2spk.values()) <= {"s0", "s1", "s2", "s3"}
    assert "1 files lie in no folder of a set" in done.stdout and "extra/x.wav" in done.stdout


@pytest.mark.parametrize(
    "options, speakers", [((), {"0", "1"}), (("--speaker_pattern", "([^/_]+)_[^/]*$"), {"ann"})]
)
def test_speakers_of_a_flat_folder(tmp_path, options, speakers):
    for number in range(30):
        sound(tmp_path / "flat" / f"{['ann', 'ben', 'cy'][number % 3]}_{number}.wav")
    done = prepare("folder", tmp_path, tmp_path / "flat", *options)
    assert done.returncode == 0, done.stderr
    sets = sets_in(tmp_path)
    found = {speaker for data in sets.values() for speaker in data.utt2spk.values()}
    if options:
        assert found == {"ann", "ben", "cy"}
        assert "ann-ann_0" in {u for data in sets.values() for u in data.wav}
    else:
        assert len(found) == 30 and "ann_0" in found
        assert "30 files count as a speaker each" in done.stdout
    for data in sets.values():
        assert all(u.startswith(s) for u, s in data.utt2spk.items())


def test_two_speakers_are_split_by_utterance_and_the_remedy_is_said(tmp_path):
    for number in range(20):
        sound(tmp_path / "two" / "ab"[number % 2] / f"{number}.wav")
    done = prepare("folder", tmp_path, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "--validate_args '--allow shared_speakers'" in done.stdout
    assert [len(data.wav) for data in sets_in(tmp_path).values()] == [2, 16, 2]


def test_compressed_audio_hidden_files_and_loops_of_links(tmp_path):
    root = tmp_path / "speech"
    for name in ("a/1.mp3", "b/1.opus", "c/1.ogg", "d/._1.wav"):
        sound(root / name)
    sound(root / ".trash" / "1.wav")
    (root / "a" / "up").symlink_to(root)
    (root / "d" / "1.m4a").touch()
    done = prepare("folder", tmp_path, root)
    assert done.returncode == 0, done.stderr
    wav = {u: path for data in sets_in(tmp_path).values() for u, path in data.wav.items()}
    assert sorted(wav) == ["a-1", "b-1", "c-1"]
    assert all(soundfile.info(path).frames > 0 for path in wav.values())
    assert "1 .m4a files left out" in done.stdout


def test_folder_without_audio_that_can_be_read(tmp_path):
    (tmp_path / "speech").mkdir()
    done = prepare("folder", tmp_path, tmp_path / "speech")
    refused(done, tmp_path, tmp_path / "speech", "no audio")
    assert "<name>.wav" in done.stderr  # the expected tree
    (tmp_path / "speech" / "a.m4a").touch()
    refused(prepare("folder", tmp_path, tmp_path / "speech"), tmp_path, "1 .m4a", "convert")
    refused(prepare("folder", tmp_path, ""), tmp_path, "give --corpus_dir")


def test_names_that_clash_and_texts_that_cannot_be_read(tmp_path, speech):
    path = sound(speech / "spk1" / "one.flac")
    refused(prepare("folder", tmp_path, speech), tmp_path, path.with_suffix(".wav"), path)
    path.unlink()
    (speech / "spk1" / "one.lab").write_text("other words")
    refused(prepare("folder", tmp_path, speech), tmp_path, "one.lab", "one.txt")
    (speech / "spk1" / "one.lab").unlink()
    (speech / "spk1" / "one.txt").write_bytes(b"first\nse\xe9cond\n")
    refused(prepare("folder", tmp_path, speech), tmp_path, "spk1/one.txt:2: not UTF-8")


def test_names_that_no_table_can_hold(tmp_path):
    for number in range(3):
        sound(tmp_path / "s" / f"{number}.wav")
    path = sound(tmp_path / "s" / "a|b.wav")
    refused(prepare("folder", tmp_path, tmp_path / "s"), tmp_path, "a|b.wav", "rename")
    path.rename(tmp_path / "s" / os.fsdecode(b"caf\xe9.wav"))
    refused(prepare("folder", tmp_path, tmp_path / "s"), tmp_path, "not UTF-8", "rename")


@pytest.mark.parametrize("pattern, what", [("(", "not a regular"), ("x", "want one group")])
def test_speaker_pattern_is_checked(tmp_path, speech, pattern, what):
    done = prepare("folder", tmp_path, speech, "--speaker_pattern", pattern)
    assert done.returncode == 2 and what in done.stderr


def test_speaker_pattern_must_match(tmp_path, speech):
    done = prepare("folder", tmp_path, speech, "--speaker_pattern", "spk([1-9])/")
    refused(done, tmp_path, speech / "spk0", "finds no speaker")


def kaldi(folder, utterances, **tables):
    """Write a data directory in the order given; relative paths if `utterances` has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"wav_scp": utterances, **tables}
    for name, table in tables.items():
        lines = "".join(f"{key} {value}".rstrip() + "\n" for key, value in table.items())
        (folder / name.replace("_scp", ".scp")).write_text(lines)
    return folder


@pytest.fixture
def directory(tmp_path):
    """Ten speakers; unsorted, paths relative to the folder above `data`."""
    root = tmp_path / "recipe"
    names = [f"s{number}-{take}" for number in (3, 1, 2, 0, 4, 5, 9, 8, 7, 6) for take in "ba"]
    for name in names:
        sound(root / "downloads" / f"{name}.wav")
    return kaldi(
        root / "data" / "all",
        {name: f"downloads/{name}.wav" for name in names},
        utt2spk={name: name[:2] for name in names},
        text={names[0]: "hello  there", names[1]: ""},
    )


def test_directory_is_split_and_its_paths_are_found(tmp_path, directory):
    done = prepare("kaldi_dir", tmp_path, directory)
    assert done.returncode == 0, done.stderr
    sets = sets_in(tmp_path)
    assert [len(sets[name].wav) for name in ("train", "valid", "test")] == [16, 2, 2]
    assert f"paths are relative to {directory.parents[1]}" in done.stdout
    assert all(Path(path).is_file() for data in sets.values() for path in data.wav.values())
    assert {u: t for data in sets.values() for u, t in data.text.items()} == {
        "s3-b": "hello  there"
    }


def test_directories_of_sets_by_name_with_espnet_references(tmp_path):
    def pairs(folder, letter):
        names = [f"{letter}{number}-1" for number in range(3)]
        noisy = {name: sound(tmp_path / "noisy" / f"{name}.wav") for name in names}
        clean = {name: sound(tmp_path / "clean" / f"{name}.wav") for name in names}
        kaldi(folder, noisy, spk1_scp=clean, utt2spk={name: name[:2] for name in names},
              text=dict.fromkeys(names, "dummy"), utt2snr=dict.fromkeys(names, 5))  # fmt: skip

    for name, letter in (("tr_26spk", "a"), ("cv_2spk", "b"), ("tt_2spk", "c"), ("tt-2", "d")):
        pairs(tmp_path / "set" / name, letter)
    refused(prepare("kaldi_dir", tmp_path, tmp_path / "set"), tmp_path, "no train", "tr_26spk")
    options = "--train tr_26spk --valid cv_2spk --test tt_2spk tt-2".split()
    done = prepare("kaldi_dir", tmp_path, tmp_path / "set", *options)
    assert done.returncode == 0, done.stderr
    sets = sets_in(tmp_path)
    assert sorted(sets) == ["train", "tt_2", "tt_2spk", "valid"]
    assert sets["train"].spk1["a0-1"] == str(tmp_path / "clean" / "a0-1.wav")
    assert (tmp_path / "data" / "tt_2" / "utt2snr").read_text().startswith("d0-1 5\n")
    assert sets["train"].text == {} and "every transcript is 'dummy'" in done.stdout


def test_found_sets_leave_nothing_out_in_silence(tmp_path):
    for name, letter in (("train", "a"), ("dev", "b"), ("test_clean", "c")):
        names = [f"{letter}{number}" for number in range(3)]
        kaldi(tmp_path / "set" / name, {n: sound(tmp_path / f"{n}.wav") for n in names})
    done = prepare("kaldi_dir", tmp_path, tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert {name: len(data.wav) for name, data in sets_in(tmp_path).items()} == {
        "train": 2,
        "valid": 3,
        "test": 1,
    }
    assert "unused: test_clean" in done.stdout
    assert "no utt2spk: each utterance is a speaker" in done.stdout


def test_pair_of_directories(tmp_path):
    names = [f"s{number}" for number in range(4)]
    for side in ("noisy", "clean"):
        kaldi(tmp_path / side, {n: sound(tmp_path / "wav" / side / f"{n}.wav") for n in names})
    kaldi(tmp_path / "clean", {}, wav_scp={n: tmp_path / "wav/clean" / f"{n}.wav" for n in names},
          text={"s1": "known of the clean side"})  # fmt: skip
    options = ("--clean_dir", tmp_path / "clean")
    done = prepare("kaldi_dir", tmp_path, tmp_path / "noisy", *options)
    assert done.returncode == 0, done.stderr
    sets = sets_in(tmp_path)
    for data in sets.values():
        for utterance, path in data.wav.items():
            assert data.spk1[utterance] == path.replace("noisy", "clean")
    assert {u for data in sets.values() for u in data.text} == {"s1"}


def test_ids_that_one_side_lacks_are_named(tmp_path):
    path = sound(tmp_path / "a.wav")
    kaldi(tmp_path / "noisy", dict.fromkeys("abcd", path))
    kaldi(tmp_path / "clean", dict.fromkeys("abde", path))
    done = prepare("kaldi_dir", tmp_path, tmp_path / "noisy", "--clean_dir", tmp_path / "clean")
    refused(done, tmp_path, tmp_path / "clean" / "wav.scp", "1 utterances", "missing: c")
    done = prepare("kaldi_dir", tmp_path, tmp_path / "noisy", "--clean_dir", tmp_path / "none")
    refused(done, tmp_path, "no such folder of clean speech")


def test_segments_are_cut(tmp_path):
    path = sound(tmp_path / "long.wav", seconds=1)
    pieces = {"u1": "rec 0.10 0.25", "u2": "rec 0.5 -1", "u3": "rec 0 0.1"}
    folder = kaldi(tmp_path / "all", {"rec": path}, segments=pieces)
    done = prepare("kaldi_dir", tmp_path, folder)
    assert done.returncode == 0, done.stderr
    wav = {u: path for data in sets_in(tmp_path).values() for u, path in data.wav.items()}
    audio = {u: soundfile.read(path, dtype="int16")[0] for u, path in wav.items()}
    assert {u: (a[0], a[-1]) for u, a in audio.items()} == {
        "u1": (1600, 3999),
        "u2": (8000, 15999),
        "u3": (0, 1599),
    }


@pytest.mark.parametrize(
    "table, line, what",
    [
        ("wav.scp", "s1-a x.wav", "all/wav.scp:21: id s1-a comes twice"),
        ("wav.scp", "x", "all/wav.scp:21: x has no file"),
        ("wav.scp", "x y.ark:17", "all/wav.scp:21: x lies in an archive"),
        ("wav.scp", "x curl host/x.wav |", "all/wav.scp:21: a pipe: x would run a shell command"),
        ("wav.scp", "x y.wav\ny y.wav", "utt2spk: utterance x has no speaker"),
        ("utt2spk", "x s1", "all/utt2spk:21: unknown utterance x"),
        ("text", "x words", "all/text:3: unknown utterance x"),
        ("text", "", "all/text:3: an empty line"),
        ("segments", "u s1-a 1", "all/segments:1: not `<utterance>"),
        ("segments", "u s1-c 0 1", "all/segments:1: recording s1-c is not in"),
        ("segments", "u s1-a 1 0.5", "all/segments:1: no segment from 1 to 0.5"),
    ],
)
def test_bad_tables_are_one_line_with_file_and_line(tmp_path, directory, table, line, what):
    with (directory / table).open("a") as stream:
        stream.write(line + "\n")
    done = prepare("kaldi_dir", tmp_path, directory)
    refused(done, tmp_path, what)
    assert len(done.stderr.splitlines()) == 1


def test_path_that_is_nowhere_and_folder_of_something_else(tmp_path, directory):
    (directory.parents[1] / "downloads").rename(tmp_path / "gone")
    refused(prepare("kaldi_dir", tmp_path, directory), tmp_path, "wav.scp:1: no such audio file")
    refused(prepare("kaldi_dir", tmp_path, tmp_path / "gone"), tmp_path, "no wav.scp")


def test_pipes_that_only_decode_are_read_directly_and_others_only_if_trusted(tmp_path):
    flac, sphere = sound(tmp_path / "with blank.flac"), tmp_path / "b.sph"
    soundfile.write(sphere, np.arange(100, dtype=np.int16), 16000, format="NIST")
    entries = {
        "a": f"flac -c -d -s {shlex.quote(str(flac))} |",
        "b": f"/opt/kaldi/sph2pipe -f wav {sphere} |",
        "c": str(flac),
    }
    folder = kaldi(tmp_path / "all", entries)
    done = prepare("kaldi_dir", tmp_path, folder)
    assert done.returncode == 0, done.stderr
    wav = {u: path for data in sets_in(tmp_path).values() for u, path in data.wav.items()}
    assert wav == {"a": str(flac), "b": str(sphere), "c": str(flac)}
    assert "2 pipes only decode" in done.stdout

    # A compressed sphere file, which libsndfile does not read, keeps its pipe if that is trusted.
    header = "NIST_1A\n   1024\nsample_count -i 100\nsample_n_bytes -i 2\nchannel_count -i 1\n"
    header += "sample_rate -i 16000\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n"
    sphere.write_bytes(header.encode().ljust(1024) + bytes(200))
    done = prepare("kaldi_dir", tmp_path, folder)
    assert done.returncode == 1 and "wav.scp:2: a pipe: b" in done.stderr
    done = prepare("kaldi_dir", tmp_path, folder, "--allow_pipes")
    assert done.returncode == 0, done.stderr
    assert "1 pipes kept; run.sh also needs --validate_args --allow_pipes" in done.stdout
    scps = [path.read_text() for path in tmp_path.glob("data/*/wav.scp")]
    assert f"b {entries['b']}\n" in scps


@pytest.mark.parametrize(
    "command, file",
    [
        ("flac -cds a.flac |", "a.flac"),
        ("flac --decode --stdout --silent 'a b.flac' |", "a b.flac"),
        ("sph2pipe -f wav -p a.wv1 |", "a.wv1"),
        ("sph2pipe -f wav -c 2 a.sph |", None),  # one channel of two
        ("flac -c -d --skip=100 a.flac |", None),
        ("flac -c -d a.flac | sox - -t wav - |", None),
        ("flac -c -d $HOME/a.flac |", None),
        ("sox a.wav -t wav - |", None),
        ("flac -c -d 'a.flac |", None),
    ],
)
def test_only_pipes_that_decode_a_whole_file_are_seen_through(command, file):
    assert piped_file(command) == file
