"""`cmkt validate`: every finding is provoked on real files; clean data has none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory

RATE = 16000


def sound(seed, seconds=1.0, level=0.1):
    return level * np.random.default_rng(seed).standard_normal(int(seconds * RATE))


def make(folder, count=4, prefix="", first=0, extension="flac", seconds=1.0):
    """Write a clean data directory of `count` utterances of as many speakers."""
    (folder / "audio files").mkdir(parents=True)  # a path with a space
    data = DataDirectory({}, {})
    for number in range(first, first + count):
        key = f"{prefix}s{number:03d}-é"
        path = folder / "audio files" / f"{key}.{extension}"
        soundfile.write(path, sound(number, seconds), RATE, subtype="PCM_16")
        data.wav[key], data.utt2spk[key] = str(path), f"{prefix}s{number:03d}"
        data.text[key] = "HELLO THERE YOU"
    data.write(folder)
    return data


def make_mixtures(folder, noise, **options):
    data = make(folder, **options)
    (folder / "spk1").mkdir()
    data.spk1 = {}
    for key, path in data.wav.items():
        data.spk1[key] = str(folder / "spk1" / Path(path).name)
        soundfile.write(data.spk1[key], 0.5 * soundfile.read(path)[0], RATE, subtype="PCM_16")
    data.extra = {
        "utt2snr": dict.fromkeys(data.wav, "5"),
        "utt2noise": dict.fromkeys(data.wav, next(iter(noise))),
        "noise.scp": noise,
    }
    data.write(folder)
    return data


def validate(capsys, *words):
    """Run the verb; return exit status, the report, and {check: finding} of the last set."""
    capsys.readouterr()
    status = main(["validate", "--json", "--nj", "1", *map(str, words)])
    output = capsys.readouterr().out
    report = json.loads(output) if output else {"sets": [{"findings": []}]}
    return status, report, {f["check"]: f for f in report["sets"][-1]["findings"]}


def edit(path, change):
    lines = path.read_bytes().decode().splitlines()
    path.write_bytes("".join(f"{line}\n" for line in change(lines)).encode())


def rewrite(data, index, samples, rate=RATE, **options):
    path = list(data.wav.values())[index]
    soundfile.write(path, samples, rate, **{"subtype": "PCM_16", **options})
    return path


def test_clean_directories_have_no_findings(tmp_path, capsys):
    for index, name in enumerate(("train", "valid", "test")):
        make(tmp_path / name, first=10 * index)
    status, report, _ = validate(capsys, *(tmp_path / n for n in ("train", "valid", "test")))
    assert status == 0 and (report["errors"], report["warnings"]) == (0, 0)
    first = report["sets"][0]
    assert first["directory"] == str(tmp_path / "train") and first["kind"] == "clean"
    assert (first["utterances"], first["speakers"], first["transcripts"]) == (4, 4, 4)
    assert first["rates"] == {"16000": 4} and first["channels"] == {"1": 4}
    assert first["hours"] == pytest.approx(4 / 3600, abs=1e-4)
    assert first["seconds"]["median"] == 1 and first["language"] == "en"


def test_mixtures_of_the_mixer_have_no_findings(mixtures, capsys):
    folder = mixtures / "audio" / "train"
    status, report, found = validate(capsys, folder)
    # The shared fixture's sentences hold digits, one speaker and the same length for all.
    assert status == 0 and set(found) <= {"digits"}
    assert report["sets"][0]["kind"] == "mixtures"


@pytest.mark.parametrize(
    "name, change, check, line",
    [
        ("wav.scp", lambda ls: [*ls, ls[3]], "duplicate_id", 5),
        ("utt2spk", lambda ls: [ls[1], ls[0], *ls[2:]], "unsorted", 2),
        ("utt2spk", lambda ls: ls[:2], "ids_differ", 3),
        ("text", lambda ls: [*ls, "zz WHO"], "ids_differ", 5),
        ("wav.scp", lambda ls: [*ls, "zz"], "bad_line", 5),
        ("wav.scp", lambda ls: [ls[0], "", *ls[1:]], "bad_line", 2),
        ("text", lambda ls: [ls[0].split()[0], *ls[1:]], "empty_transcript", 1),
        ("wav.scp", lambda ls: [*ls[:3], f"{ls[3].split()[0]} cat x.wav |"], "pipe", 4),
        ("spk2utt", lambda ls: [*ls[:3], "s003 s000-é"], "spk2utt_differs", 4),
    ],
)
def test_tables(tmp_path, capsys, name, change, check, line):
    make(tmp_path / "train")
    edit(tmp_path / "train" / name, change)
    status, _, found = validate(capsys, tmp_path / "train")
    assert status == 1 and found[check]["severity"] == "error"
    where = "wav.scp" if (name, check) == ("utt2spk", "ids_differ") else name
    example = found[check]["examples"][0]
    assert example["file"] == str(tmp_path / "train" / where) and example["line"] == line
    assert found[check]["remedy"]


def test_all_problems_are_reported_at_once_with_their_places(tmp_path, capsys):
    data = make(tmp_path / "train", count=8)
    folder = tmp_path / "train"
    edit(folder / "wav.scp", lambda ls: [ls[1], ls[0], *ls[2:], "a/b nowhere.wav"])
    edit(folder / "text", lambda ls: [ls[0], *ls[:2], ls[2].split()[0], *ls[4:]])
    with (folder / "utt2spk").open("ab") as stream:
        stream.write(b"caf\xe9 s\n")
    (folder / "spk2utt").unlink()
    rewrite(data, 5, np.zeros(RATE))
    _, report, found = validate(capsys, folder)
    assert {"unsorted", "slash_in_id", "ids_differ", "duplicate_id", "empty_transcript"} <= set(
        found
    )
    assert {"bad_line", "missing_table", "unreadable_audio", "silent_audio"} <= set(found)
    main(["validate", str(folder)])
    printed = capsys.readouterr()
    assert f"{folder}/wav.scp:2: s000-é comes after s001-é" in printed.out
    assert f"{folder}/text:2: s000-é: the same value in line 1" in printed.out
    assert f"error: {report['errors']} errors in the data" in printed.err.splitlines()[-1]


def test_missing_tables(tmp_path, capsys):
    make(tmp_path / "train")
    (tmp_path / "train" / "wav.scp").unlink()
    status, _, found = validate(capsys, tmp_path / "train")
    assert status == 1 and found["missing_table"]["examples"][0]["file"].endswith("wav.scp")
    (tmp_path / "train" / "wav.scp").touch()
    assert "no_utterances" in validate(capsys, tmp_path / "train")[2]


def break_flac(path):
    """Damage the middle of the coded audio."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    path.write_bytes(content)


def test_unreadable_audio(tmp_path, capsys):
    data = make(tmp_path / "train", count=9, extension="wav")
    paths = [Path(path) for path in data.wav.values()]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-2000])  # a cut-off wav
    soundfile.write(paths[2], sound(2), RATE, format="FLAC")
    paths[2].write_bytes(paths[2].read_bytes()[:-5000])  # a cut-off flac
    soundfile.write(paths[3], sound(3), RATE, format="FLAC")
    break_flac(paths[3])
    paths[4].write_bytes(b"no audio")
    paths[5].write_bytes(b"")
    soundfile.write(paths[6], np.full(RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write(paths[7], np.zeros(0), RATE)
    status, report, found = validate(capsys, tmp_path / "train")
    assert status == 1 and found["unreadable_audio"]["count"] == 8
    assert report["sets"][0]["rates"] == {"16000": 1}
    details = [example["detail"] for example in found["unreadable_audio"]["examples"]]
    assert "no such audio file" in details[0] and "truncated" in details[1]


def test_few_unreadable_files_are_a_warning(tmp_path, capsys):
    data = make(tmp_path / "train", count=101, seconds=0.2)
    Path(list(data.wav.values())[7]).unlink()
    status, _, found = validate(capsys, tmp_path / "train")
    assert status == 0 and found["unreadable_audio"]["severity"] == "warning"
    assert found["unreadable_audio"]["examples"][0]["line"] == 8
    Path(list(data.wav.values())[8]).unlink()  # two of 101 are more than 1 %
    status, _, found = validate(capsys, tmp_path / "train")
    assert status == 1 and found["unreadable_audio"]["severity"] == "error"
    status, _, found = validate(capsys, tmp_path / "train", "--allow", "unreadable_audio")
    assert status == 0 and found["unreadable_audio"]["severity"] == "warning"


def clip(samples, count):
    samples = samples.copy()
    samples[: 10 * count].reshape(count, 10)[:, :4] = 1.0  # runs of four
    return samples


@pytest.mark.parametrize(
    "samples, options, check",
    [
        (np.zeros(RATE), {}, "silent_audio"),
        (sound(0, 1, 5e-5), {}, "silent_audio"),
        (clip(sound(0), 20), {}, "clipped_audio"),
        (clip(sound(0), 20), {"subtype": "FLOAT", "format": "WAV"}, "clipped_audio"),
        (sound(0) + 0.05, {}, "dc_offset"),
        (sound(0, 0.05), {}, "short_audio"),
        (sound(0, 61), {}, "long_audio"),
        (np.stack([sound(0), sound(1)], axis=1), {}, "several_channels"),
        (sound(1), {}, "duplicate_audio"),
        (sound(0), {"rate": 8000}, "mixed_rates"),
    ],
)
def test_audio(tmp_path, capsys, samples, options, check):
    data = make(tmp_path / "train")
    rewrite(data, 0, samples, **options)
    _, report, found = validate(capsys, tmp_path / "train", "--allow", "silent_audio")
    found.pop("speaking_rate", None)  # three words in 0.05 or 61 s
    assert list(found) == [check] and found[check]["count"] == 1
    if check == "mixed_rates":
        assert report["sets"][0]["rates"] == {"8000": 1, "16000": 3}


def test_quiet_speech_and_single_peaks_are_not_taken_for_faults(tmp_path, capsys):
    data = make(tmp_path / "train")
    rewrite(data, 0, sound(0, 1, 5e-4))  # -66 dBFS
    peaks = sound(1)
    peaks[::100], peaks[50::100] = 1.0, -1.0  # at full scale, but not in runs
    rewrite(data, 1, peaks)
    assert validate(capsys, tmp_path / "train")[2] == {}


def test_containers_do_not_matter(tmp_path, capsys):
    train, test = make(tmp_path / "train"), make(tmp_path / "test", first=20)
    # FLAC named .wav is read by content; the same samples in other containers are found.
    samples, _ = soundfile.read(list(train.wav.values())[2], dtype="int16")
    rewrite(test, 0, samples, format="WAV")
    rewrite(test, 1, soundfile.read(list(train.wav.values())[3])[0], subtype="FLOAT", format="WAV")
    status, _, found = validate(capsys, tmp_path / "train", tmp_path / "test")
    assert status == 1 and found["shared_audio"]["count"] == 2
    assert "s002-é in " in found["shared_audio"]["examples"][0]["detail"]
    for path in train.wav.values():
        Path(path).rename(Path(path).with_suffix(".wav"))
    edit(tmp_path / "train" / "wav.scp", lambda ls: [line.replace(".flac", ".wav") for line in ls])
    assert validate(capsys, tmp_path / "train")[2] == {}


def test_shared_speakers_can_be_allowed(tmp_path, capsys):
    make(tmp_path / "train")
    make(tmp_path / "test", first=3)  # speaker s003, and its sentence, in both
    command = (tmp_path / "train", tmp_path / "test")
    status, report, found = validate(capsys, *command)
    assert status == 1 and set(found) == {"shared_speakers", "shared_audio"}
    assert found["shared_speakers"]["count"] == 1 and report["sets"][0]["findings"] == []
    allow = ["--allow", "shared_speakers", "--allow", "shared_audio"]
    status, report, found = validate(capsys, *allow, *command)
    assert status == 0 and report["warnings"] == 2


def test_mixtures(tmp_path, capsys):
    noise = {"DKITCHEN/ch01.wav": "/noise/DKITCHEN/ch01.wav"}
    train = make_mixtures(tmp_path / "train", noise)
    assert validate(capsys, tmp_path / "train")[:1] == (0,)
    # Another microphone of the same recording, elsewhere on the disk.
    other = {"DKITCHEN/ch05.wav": "/elsewhere/DKITCHEN/ch05.wav"}
    make_mixtures(tmp_path / "test", other, first=10)
    status, _, found = validate(capsys, tmp_path / "train", tmp_path / "test")
    assert status == 1 and set(found) == {"shared_noise"}
    assert found["shared_noise"]["examples"][0]["line"] == 1
    # Another name for the same file.
    make_mixtures(tmp_path / "valid", {"new.wav": "/noise/../noise/DKITCHEN/ch01.wav"}, first=20)
    assert set(validate(capsys, tmp_path / "train", tmp_path / "valid")[2]) == {"shared_noise"}
    make_mixtures(tmp_path / "fine", {"PARK/ch01.wav": "/noise/PARK/ch01.wav"}, first=30)
    assert validate(capsys, tmp_path / "train", tmp_path / "fine")[2] == {}
    # Pairs of unequal length or rate.
    references = list(train.spk1.values())
    soundfile.write(references[0], sound(0, 0.9), RATE)
    soundfile.write(references[1], sound(1), 8000)
    status, _, found = validate(capsys, tmp_path / "train")
    assert status == 1 and found["pair_differs"]["count"] == 2


@pytest.mark.parametrize(
    "line, check",
    [
        ("我们明天去北京", "wrong_script"),
        ("ROOM 101 IS FREE", "digits"),
        ("HELLO\x07 THERE", "control_characters"),
        ("BROKEN \ufffd HERE", "control_characters"),
        ("A", "speaking_rate"),
        ("A FAR TOO LONG SENTENCE FOR ONE SECOND OF SPEECH " * 3, "speaking_rate"),
    ],
)
def test_transcripts(tmp_path, capsys, line, check):
    make(tmp_path / "train", count=24)
    edit(tmp_path / "train" / "text", lambda ls: [*ls[:4], f"{ls[4].split()[0]} {line}", *ls[5:]])
    status, _, found = validate(capsys, tmp_path / "train")
    assert status == 0 and check in found
    assert found[check]["count"] == 1 and found[check]["examples"][0]["line"] == 5


def test_language_is_that_of_most_transcripts_or_given(tmp_path, capsys):
    make(tmp_path / "train")
    han = ["我 用 Google 搜索", "今天天气很好", "他们去了上海", "HELLO THERE"]
    edit(
        tmp_path / "train" / "text",
        lambda ls: [f"{old.split()[0]} {new}" for old, new in zip(ls, han, strict=True)],
    )
    _, report, found = validate(capsys, tmp_path / "train")
    assert report["sets"][0]["language"] == "zh" and found["wrong_script"]["count"] == 1
    assert found["wrong_script"]["examples"][0]["line"] == 4
    assert validate(capsys, tmp_path / "train", "--lang", "en")[2]["wrong_script"]["count"] == 2


def test_share_without_text(tmp_path, capsys):
    make(tmp_path / "train")
    edit(tmp_path / "train" / "text", lambda ls: ls[:3])
    _, report, found = validate(capsys, tmp_path / "train")
    assert report["sets"][0]["without_text_share"] == 0.25 and not found


def test_fix_makes_a_clean_directory(tmp_path, capsys):
    noise = {"a.wav": "/noise/a.wav"}
    data = make_mixtures(tmp_path / "train", noise, count=10)
    folder, out = tmp_path / "train", tmp_path / "fixed"
    rewrite(data, 0, np.zeros(RATE))
    Path(list(data.wav.values())[1]).write_bytes(b"no audio")
    soundfile.write(list(data.spk1.values())[2], sound(0, 0.9), RATE)
    edit(folder / "utt2spk", lambda ls: ls[::-1][:-4] + ls[:3])  # unsorted, one missing
    edit(folder / "text", lambda ls: [*ls[:5], ls[5].split()[0], *ls[6:], ls[6]])
    edit(folder / "wav.scp", lambda ls: [*ls, ls[8].replace("é.flac", "other.flac"), ls[9]])
    before = {path: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    assert main(["validate", str(folder), "--fix", str(out), "--nj", "1"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    fixed = DataDirectory.read(out)
    assert [key[:4] for key in fixed.wav] == ["s004", "s005", "s006", "s007", "s009"]
    assert [key[:4] for key in fixed.text] == ["s004", "s006", "s007", "s009"]
    dropped = dict(line.split(maxsplit=1) for line in (out / "dropped").read_text().splitlines())
    assert {key[:4]: why.split()[0] for key, why in dropped.items()} == {
        **{"s000": "silent_audio", "s001": "unreadable_audio", "s002": "pair_differs"},
        **{"s003": "ids_differ", "s005": "transcript", "s008": "duplicate_id"},
    }
    assert validate(capsys, out)[::2] == (0, {})
    # The same again changes nothing; nothing else is replaced.
    assert main(["validate", str(folder), "--fix", str(out)]) == 0
    make(tmp_path / "precious")
    assert main(["validate", str(folder), "--fix", str(tmp_path / "precious")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert len(DataDirectory.read(tmp_path / "precious").wav) == 4


@pytest.mark.parametrize("option", ["--fix", "--output_dir"])
def test_nothing_is_written_in_place_or_around(tmp_path, capsys, option):
    make(tmp_path / "data" / "train")
    for output in (tmp_path / "data" / "train", tmp_path / "data"):
        assert main(["validate", str(tmp_path / "data" / "train"), option, str(output)]) == 1
        assert "would replace" in capsys.readouterr().err
    assert DataDirectory.read(tmp_path / "data" / "train")


def test_wrong_command_lines(tmp_path, capsys):
    make(tmp_path / "a")
    make(tmp_path / "b", first=5)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for words in ([a, a], [a, "/nowhere"], [a, b, "--fix", str(tmp_path / "c")], [a, "--nj", "0"]):
        assert main(["validate", *words]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["validate", a, "--allow", "digits"])


def test_second_run_is_up_to_date_until_something_changes(tmp_path, capsys):
    data = make(tmp_path / "train")
    Path(list(data.wav.values())[0]).unlink()
    command = ["validate", str(tmp_path / "train"), "--output_dir", str(tmp_path / "report")]
    assert main(command) == 1
    first = capsys.readouterr()
    assert "unreadable_audio" in (tmp_path / "report" / "report.txt").read_text()
    assert json.loads((tmp_path / "report" / "report.json").read_text())["errors"] == 1
    assert main(command) == 1  # errors stay errors
    second = capsys.readouterr()
    assert second.out == f"{tmp_path / 'report'}: up to date\n{first.out}"
    assert "train: " not in second.err  # no progress bar: nothing was decoded
    rewrite(data, 0, sound(0))
    assert main(command) == 0
    # What was measured of unchanged files is not measured again: tamper with it and see.
    tamper(tmp_path / "report", "s001-é")
    rewrite(data, 0, sound(99))
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.count("s001-é: mean +0.500") == 1 and "s000" not in out


def tamper(folder, utterance):
    """Change the measured offset of one utterance in the journal."""
    journal = folder / "audio_0.jsonl"
    results = [json.loads(line) for line in journal.read_text().splitlines()]
    for result in results:
        if result["utterance"] == utterance:
            result["audio"][0][6] = 0.5
    journal.write_text("".join(json.dumps(result) + "\n" for result in results))


def test_killed_run_goes_on(tmp_path):
    make(tmp_path / "train", count=1, seconds=50)
    for path in sorted((tmp_path / "train" / "audio files").iterdir()):
        for copy in range(40):  # hard links: much to decode, little to write
            os.link(path, path.with_name(f"{path.stem}{copy:02d}.flac"))
    files = sorted((tmp_path / "train" / "audio files").iterdir())
    data = DataDirectory({f.stem: str(f) for f in files}, {f.stem: f.stem for f in files})
    (tmp_path / "train" / "text").unlink()
    data.write(tmp_path / "train")
    command = [sys.executable, "-m", "cmkt.cli", "validate", "train", "--nj", "1"]
    command += ["--output_dir", "report"]
    journal = tmp_path / ".report.work" / "audio_0.jsonl"
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "report").exists()
    done = [line for line in journal.read_text().splitlines() if line.endswith("}")]
    assert 0 < len(done) < len(files)
    tamper(tmp_path / ".report.work", files[0].stem)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{files[0].stem}: mean +0.500" in done.stdout
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["sets"][0]["utterances"] == len(files)


def test_number_of_jobs_does_not_matter(tmp_path, capsys):
    data = make(tmp_path / "train", count=12)
    make(tmp_path / "test", first=11)
    rewrite(data, 3, np.zeros(RATE))
    Path(list(data.wav.values())[5]).unlink()
    folders = (tmp_path / "train", tmp_path / "test")
    assert validate(capsys, *folders)[1] == validate(capsys, *folders, "--nj", "3")[1]


def test_compressed_wav_that_cannot_seek_is_read(tmp_path, capsys):
    data = make(tmp_path / "train")
    path = list(data.wav.values())[0]
    samples, rate = soundfile.read(path)
    soundfile.write(path, samples, rate, format="WAV", subtype="GSM610")
    assert validate(capsys, tmp_path / "train")[::2] == (0, {})


def test_pipes_are_run_only_if_allowed(tmp_path, capsys):
    data = make(tmp_path / "train")
    command = f"touch {tmp_path}/ran; cat '{list(data.wav.values())[0]}' |"
    edit(tmp_path / "train" / "wav.scp", lambda ls: [f"{ls[0].split()[0]} {command}", *ls[1:]])
    status, _, found = validate(capsys, tmp_path / "train")
    assert status == 1 and list(found) == ["pipe"] and not (tmp_path / "ran").exists()
    assert validate(capsys, tmp_path / "train", "--allow_pipes")[::2] == (0, {})
    assert (tmp_path / "ran").exists()
