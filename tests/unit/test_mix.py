"""Mixing: the SNR is what it says, whatever the jobs; bad input is named before any work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.corpus.level import PEAK, active_power, is_silent, mix_at_snr
from cmkt.corpus.mix import mix
from cmkt.corpus.mixer import SnrPlan, shard_path
from cmkt.corpus.noise import fit_length, list_audio, read_stretch
from cmkt.errors import CmktError
from cmkt.stage import MARKER

FS = 16000


def speech(rng, seconds=1.0, level=0.1, fs=FS):
    """Bursts of noise with pauses between them."""
    samples = rng.standard_normal(int(seconds * fs)) * level
    samples *= (np.arange(len(samples)) // int(0.3 * fs)) % 2 == 0
    return np.clip(samples, -0.9, 0.9)


def write(path, samples, fs=FS):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, fs)


def data_dir(folder, count=4, **levels):
    rng = np.random.default_rng(1)
    wav = {}
    for index in range(count):
        name = f"u{index}"
        wav[name] = str(folder / "corpus" / f"{name}.wav")
        write(Path(wav[name]), speech(rng, 1 + 0.2 * index, levels.get(name, 0.1)))
    (folder / "data").mkdir(exist_ok=True)
    text = {"u1": "some words"} if count > 1 else {}
    DataDirectory(wav, dict.fromkeys(wav, "s"), text=text).write(folder / "data")
    return folder / "data"


@pytest.fixture
def noise(tmp_path):
    rng = np.random.default_rng(2)
    write(tmp_path / "noise" / "a" / "long.WAV", rng.standard_normal(5 * FS) * 0.05)
    write(tmp_path / "noise" / "short.flac", rng.standard_normal(FS // 2) * 0.2)
    write(tmp_path / "noise" / "fast.wav", rng.standard_normal((44100, 2)) * 0.1, 44100)
    return tmp_path / "noise"


def content(folder):
    """All files, with the folder's own name taken out of the tables."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(str(folder).encode(), b"")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def achieved_snr(folder, key):
    data = DataDirectory.read(folder)
    mixture, _ = soundfile.read(data.wav[key])
    clean, fs = soundfile.read(data.spk1[key])
    power = active_power(clean, fs)
    return 10 * np.log10(power / np.mean((mixture - clean) ** 2)), np.abs(mixture).max()


# Levels


def test_active_power_ignores_pauses():
    rng = np.random.default_rng(0)
    burst = rng.standard_normal(FS) * 0.1
    long_pause = np.concatenate([burst, 1e-3 * rng.standard_normal(4 * FS)])
    # P.56 keeps 200 ms of pause after the burst.
    expected = 0.01 * 1 / 1.2
    assert active_power(long_pause, FS) == pytest.approx(expected, rel=0.03)
    assert active_power(burst, FS) == pytest.approx(np.mean(burst**2), rel=1e-6)
    assert active_power(3 * long_pause, FS) == pytest.approx(9 * active_power(long_pause, FS))


def test_level_of_fewer_samples_than_a_frame():
    assert active_power(np.full(10, 0.5), FS) == pytest.approx(0.25)
    assert not is_silent(np.full(10, 0.5), FS)


def test_is_silent():
    assert is_silent(np.zeros(FS), FS) and is_silent(np.full(FS, 2 / 32768), FS)
    click = np.zeros(FS)
    click[100] = 0.5
    assert not is_silent(click, FS)


@pytest.mark.parametrize("level", [1e-3, 0.1, 0.9])
def test_mix_scales_both_and_never_clips(level):
    rng = np.random.default_rng(0)
    clean = speech(rng, 2, level)
    mixture, reference = mix_at_snr(clean, rng.standard_normal(len(clean)), -5, FS)
    assert np.abs(mixture).max() <= PEAK + 1e-12
    ratio = reference[clean != 0] / clean[clean != 0]
    assert np.ptp(ratio) < 1e-9
    assert 10 * np.log10(
        active_power(reference, FS) / np.mean((mixture - reference) ** 2)
    ) == pytest.approx(-5, abs=1e-6)


# Noise


def test_loop_has_no_seam():
    t = np.arange(FS) / FS
    looped = fit_length(np.sin(2 * np.pi * 101.3 * t), 5 * FS, FS, 0.4)
    assert len(looped) == 5 * FS
    # A tone of amplitude 1 moves by at most 2 pi f / fs per sample; equal power allows sqrt(2) of
    # that. A hard seam would jump.
    assert np.abs(np.diff(looped)).max() < 2**0.5 * 2 * np.pi * 101.3 / FS * 1.1


def test_loop_keeps_the_level_of_noise():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(FS)
    looped = fit_length(noise, 20 * FS, FS, 0.0)
    assert np.mean(looped**2) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("length", [1, 2, 3, 1000])
def test_noise_of_any_length_is_fitted(length):
    for wanted in (1, 7, 5000):
        assert fit_length(np.ones(length), wanted, FS, 0.999).shape == (wanted,)


@pytest.mark.parametrize("name", ["a/long.WAV", "short.flac", "fast.wav"])
@pytest.mark.parametrize("position", [0.0, 0.5, 0.999999])
def test_stretch_has_the_wanted_length(noise, name, position):
    assert read_stretch(noise / name, FS, FS, position, channel=1).shape == (FS,)


def test_crop_is_that_part_of_the_file(noise):
    whole, _ = soundfile.read(noise / "a" / "long.WAV", dtype="float32")
    first = read_stretch(noise / "a" / "long.WAV", FS, FS, 0.0)
    assert np.array_equal(first, whole[:FS])


def test_listing_is_recursive_and_sorted(noise):
    (noise / "readme.txt").write_text("x")
    assert list(list_audio(noise)) == ["a/long.WAV", "fast.wav", "short.flac"]
    scp = noise / "wav.scp"
    scp.write_text("n1 /x/1.wav\nn2 /x/2.wav\n")
    assert list_audio(scp) == {"n1": Path("/x/1.wav"), "n2": Path("/x/2.wav")}


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_split_by_folder(tmp_path):
    touch(tmp_path, ["TR/1.wav", "TR/x/2.wav", "tt/3.wav", "other/4.wav"])
    assert list(list_audio(tmp_path, "train")) == ["TR/1.wav", "TR/x/2.wav"]
    assert list(list_audio(tmp_path, "valid")) == ["TR/1.wav", "TR/x/2.wav"]
    assert list(list_audio(tmp_path, "test")) == ["tt/3.wav"]
    touch(tmp_path, ["cv/5.wav"])
    assert list(list_audio(tmp_path, "valid")) == ["cv/5.wav"]


def test_split_by_hash_parts_the_files_and_is_stable(tmp_path):
    touch(tmp_path, [f"n{index}.wav" for index in range(400)])
    parts = {split: set(list_audio(tmp_path, split)) for split in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 400
    assert 250 < len(parts["train"]) < 310 and 55 < len(parts["test"]) < 105
    touch(tmp_path, ["new.wav"])
    assert set(list_audio(tmp_path, "test")) - {"new.wav"} == parts["test"]


def test_noise_errors(tmp_path):
    with pytest.raises(CmktError, match="no such noise folder"):
        list_audio(tmp_path / "none")
    with pytest.raises(CmktError, match="no noise files"):
        list_audio(tmp_path)
    touch(tmp_path, ["only.wav"])
    with pytest.raises(CmktError, match="too few noise recordings"):
        for split in ("train", "valid", "test"):
            list_audio(tmp_path, split)


# SNR plans


def test_snr_plans():
    rng = np.random.default_rng(0)
    drawn = [SnrPlan.parse("-5:10").draw(rng)[0] for _ in range(200)]
    assert -5 <= min(drawn) < -3 and 8 < max(drawn) <= 10
    assert {SnrPlan.parse("-5,0,5").draw(rng)[0] for _ in range(50)} == {-5, 0, 5}
    assert SnrPlan.parse("each:-5,0").draw(rng) == [-5, 0]
    for bad in ("", "x", "10:-5", "1:2:3", "each:", "0,0", "nan", "0:90"):
        with pytest.raises(CmktError, match="--snr"):
            SnrPlan.parse(bad)


# The verb


def test_mixtures_have_the_snr_in_the_table(tmp_path, noise):
    mix(data_dir(tmp_path, 6, u2=0.9, u3=1e-3), tmp_path / "out", noise, snr="-5:10", nj=1)
    data = DataDirectory.read(tmp_path / "out")
    assert list(data.wav) == [f"u{i}" for i in range(6)]
    assert data.text == {"u1": "some words"}
    snrs = read_table(tmp_path / "out" / "utt2snr")
    assert set(read_table(tmp_path / "out" / "utt2noise").values()) <= set(list_audio(noise))
    for key, snr in snrs.items():
        achieved, peak = achieved_snr(tmp_path / "out", key)
        assert achieved == pytest.approx(float(snr), abs=0.1)
        assert peak <= PEAK + 1e-4
    assert not list((tmp_path / "out").glob(".mixed*"))


def test_result_depends_on_seed_and_id_alone(tmp_path, noise):
    source = data_dir(tmp_path, 12)
    mix(source, tmp_path / "one", noise, nj=1)
    mix(source, tmp_path / "three", noise, nj=3)
    one = content(tmp_path / "one")
    assert one == content(tmp_path / "three")
    mix(source, tmp_path / "other", noise, nj=1, seed=1)
    assert one[shard_path("audio", "u0")] != content(tmp_path / "other")[shard_path("audio", "u0")]
    for name in ("wav.scp", "utt2spk", "text"):  # without the other utterances
        kept = [x for x in (source / name).read_text().splitlines() if x.startswith("u1 ")]
        (source / name).write_text("".join(f"{x}\n" for x in kept))
    mix(source, tmp_path / "alone", noise, nj=1)
    assert content(tmp_path / "alone")[shard_path("audio", "u1")] == one[shard_path("audio", "u1")]


def test_each_snr_with_the_same_noise(tmp_path, noise):
    mix(data_dir(tmp_path, 2), tmp_path / "out", noise, snr="each:-5,0.5", nj=1)
    snrs = read_table(tmp_path / "out" / "utt2snr")
    assert snrs == {"u0_snr-5": "-5", "u0_snr0.5": "0.5", "u1_snr-5": "-5", "u1_snr0.5": "0.5"}
    noises = read_table(tmp_path / "out" / "utt2noise")
    assert noises["u0_snr-5"] == noises["u0_snr0.5"]
    assert set(read_table(tmp_path / "out" / "text")) == {"u1_snr-5", "u1_snr0.5"}


def test_second_run_does_nothing_and_a_change_redoes(tmp_path, noise):
    source, out = data_dir(tmp_path), tmp_path / "out"
    mix(source, out, noise, nj=1)
    before = (out / "wav.scp").stat().st_mtime_ns
    mix(source, out, noise, nj=2)
    assert (out / "wav.scp").stat().st_mtime_ns == before
    mix(source, out, noise, nj=1, snr="20")
    assert set(read_table(out / "utt2snr").values()) == {"20"}
    write(tmp_path / "corpus" / "u0.wav", np.ones(4 * FS) * 0.1)
    mix(source, out, noise, nj=1, snr="20")
    assert soundfile.info(out / shard_path("audio", "u0")).frames == 4 * FS


def test_rate_is_converted(tmp_path, noise):
    source = data_dir(tmp_path, 1)
    write(tmp_path / "corpus" / "u0.wav", speech(np.random.default_rng(0), 2, fs=44100), 44100)
    mix(source, tmp_path / "out", noise, fs=8000, nj=1)
    header = soundfile.info(tmp_path / "out" / shard_path("audio", "u0"))
    assert (header.samplerate, header.frames, header.subtype) == (8000, 16000, "PCM_16")


def test_stated_channel_is_used(tmp_path, noise):
    source = data_dir(tmp_path, 1)
    clean = speech(np.random.default_rng(0), 1)
    write(tmp_path / "corpus" / "u0.wav", np.stack([np.zeros(FS), clean], 1))
    mix(source, tmp_path / "out", noise, nj=1, channel=1, snr="30")
    reference, _ = soundfile.read(tmp_path / "out" / shard_path("spk1", "u0"))
    assert np.abs(reference - clean).max() < 1e-4


def test_silence_is_skipped_and_named(tmp_path, noise):
    write(noise / "dead.wav", np.zeros(FS))
    out = tmp_path / "out"
    mix(data_dir(tmp_path, 12, u2=0.0), out, noise, nj=1)
    assert "u2" not in read_table(out / "wav.scp") and len(read_table(out / "wav.scp")) == 11
    assert read_table(out / "skipped") == {"dead.wav": "silent noise", "u2": "silent speech"}
    assert "dead.wav" not in read_table(out / "utt2noise").values()


def test_silent_stretch_of_a_sound_file_is_not_used(tmp_path):
    samples = np.zeros(60 * FS)
    samples[:100] = 0.5
    write(tmp_path / "n" / "mostly.wav", samples)
    write(tmp_path / "n" / "good.wav", np.random.default_rng(0).standard_normal(FS) * 0.1)
    mix(data_dir(tmp_path, 8), tmp_path / "out", tmp_path / "n", nj=1)
    assert not (tmp_path / "out" / "skipped").exists()
    assert set(read_table(tmp_path / "out" / "utt2noise").values()) == {"good.wav"}


def test_only_silence_is_an_error(tmp_path):
    write(tmp_path / "n" / "dead.wav", np.zeros(FS))
    with pytest.raises(CmktError, match="nothing left"):
        mix(data_dir(tmp_path, 2), tmp_path / "out", tmp_path / "n", nj=1)
    assert not (tmp_path / "out").exists()


# Paired data


def paired(folder, fs=FS, reference=None, reference_fs=None):
    rng = np.random.default_rng(0)
    clean = speech(rng, 1, fs=fs)
    noisy = np.round((clean + 0.01 * rng.standard_normal(fs)) * 32768) / 32768
    reference = clean if reference is None else reference
    write(folder / "noisy.wav", noisy, fs)
    write(folder / "clean.wav", reference, reference_fs or fs)
    (folder / "data").mkdir()
    DataDirectory(
        {"a": str(folder / "noisy.wav")},
        {"a": "s"},
        {"a": str(folder / "clean.wav")},
        extra={"utt2snr": {"a": "7"}},
    ).write(folder / "data")
    return noisy


def test_paired_data_is_copied_without_noise(tmp_path):
    noisy = paired(tmp_path)
    mix(tmp_path / "data", tmp_path / "out", noise_dir="", nj=1)
    copied, _ = soundfile.read(tmp_path / "out" / shard_path("audio", "a"))
    assert np.array_equal(copied, noisy)
    assert read_table(tmp_path / "out" / "utt2snr") == {"a": "7"}
    assert not (tmp_path / "out" / "utt2noise").exists()


@pytest.mark.parametrize(
    "reference, rate, what",
    [(np.ones(FS - 5) * 0.1, FS, "samples"), (np.ones(FS) * 0.1, 8000, "Hz")],
)
def test_unequal_pair_is_refused(tmp_path, reference, rate, what):
    paired(tmp_path, reference=reference, reference_fs=rate)
    with pytest.raises(CmktError, match=rf"spk1\.scp:1: a: the reference has \d+ {what}"):
        mix(tmp_path / "data", tmp_path / "out", nj=1)
    assert not (tmp_path / "out").exists()


# Bad audio


def break_file(path, how):
    if how == "empty":
        path.write_bytes(b"")
    elif how == "no samples":
        write(path, np.zeros(0))
    elif how == "text":
        path.write_text("no audio here")
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("nj", [1, 2])
@pytest.mark.parametrize("how", ["empty", "no samples", "text", "missing", "truncated"])
def test_bad_speech_is_one_line_with_file_and_line(tmp_path, noise, how, nj, capsys):
    source, out = data_dir(tmp_path), tmp_path / "out"
    bad = tmp_path / "corpus" / "u2.wav"
    break_file(bad, how)
    options = {"data_dir": source, "output_dir": out, "noise_dir": noise, "nj": nj}
    assert main(["mix", *(f"--{name}={value}" for name, value in options.items())]) == 1
    error = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert len(error) == 1
    assert f"{source}/wav.scp:3: u2: " in error[0] and str(bad) in error[0] and "(" in error[0]
    assert not out.exists()


def test_truncated_flac_is_found_while_mixing(tmp_path, noise):
    source = data_dir(tmp_path)
    bad = tmp_path / "corpus" / "u2.wav"
    samples, _ = soundfile.read(bad)
    soundfile.write(bad, samples, FS, format="FLAC")
    break_file(bad, "truncated")
    with pytest.raises(CmktError, match=r"wav\.scp:3: u2: .*u2\.wav"):
        mix(source, tmp_path / "out", noise, nj=2)
    assert not (tmp_path / "out").exists()


def test_bad_noise_is_named(tmp_path, noise):
    break_file(noise / "short.flac", "text")
    with pytest.raises(CmktError, match=r"short\.flac"):
        mix(data_dir(tmp_path), tmp_path / "out", noise, nj=1)


def test_length_of_a_streamed_wav_is_no_error(tmp_path, noise):
    source = data_dir(tmp_path)
    path = tmp_path / "corpus" / "u0.wav"
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"  # as written by ffmpeg into a pipe
    path.write_bytes(data)
    mix(source, tmp_path / "out", noise, nj=1)
    assert soundfile.info(tmp_path / "out" / shard_path("audio", "u0")).frames == FS


def test_pipe_runs_only_when_trusted(tmp_path, noise):
    source = data_dir(tmp_path)
    table = (source / "wav.scp").read_text()
    path = tmp_path / "corpus" / "u0.wav"
    (source / "wav.scp").write_text(table.replace(f"u0 {path}", f"u0 cat {path} |"))
    with pytest.raises(CmktError, match="--allow_pipes"):
        mix(source, tmp_path / "out", noise, nj=1)
    mix(source, tmp_path / "out", noise, nj=1, allow_pipes=True)
    (source / "wav.scp").write_text(table)
    mix(source, tmp_path / "files", noise, nj=1)
    assert content(tmp_path / "out") == content(tmp_path / "files")
    (source / "wav.scp").write_text(table.replace(f"u0 {path}", "u0 false |"))
    with pytest.raises(CmktError, match=r"wav\.scp:1: u0: its command gave no audio"):
        mix(source, tmp_path / "bad", noise, nj=1, allow_pipes=True)


def test_command_line_errors(tmp_path, noise, capsys):
    source = data_dir(tmp_path)
    base = ["mix", "--data_dir", str(source), "--output_dir", str(tmp_path / "out")]
    assert main(base) == 1
    assert "--noise_dir" in capsys.readouterr().err
    assert main([*base, "--noise_dir", str(noise), "--snr", "loud"]) == 1
    assert "--snr" in capsys.readouterr().err
    assert main([*base, "--noise_dir", str(noise), "--nj", "0"]) == 1
    assert main([*base, "--noise_dir", str(noise), "--snr", "-5:-1", "--nj", "1"]) == 0


# Killed


def test_killed_run_is_resumed_to_the_same_result(tmp_path, noise):
    source, out = data_dir(tmp_path, 60), tmp_path / "out"
    for path in (tmp_path / "corpus").glob("*.wav"):
        write(path, np.tile(soundfile.read(path)[0], 4))
    command = [sys.executable, "-m", "cmkt.cli", "mix", "--data_dir", str(source), "--nj", "2"]
    command += ["--noise_dir", str(noise), "--output_dir", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    journal = tmp_path / ".out.work" / ".mixed.jsonl"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    with journal.open("a") as stream:
        stream.write('{"utterance": "u')  # killed in the middle of a line
    done = len(journal.read_text().splitlines()) - 1
    assert 0 < done < 60
    first = tmp_path / ".out.work" / shard_path("audio", "u0")
    written = first.stat().st_mtime_ns
    mix(source, out, noise, nj=1)
    assert (out / shard_path("audio", "u0")).stat().st_mtime_ns == written
    mix(source, tmp_path / "whole", noise, nj=1)
    assert content(out) == content(tmp_path / "whole")
    assert_no_process_of(process.pid)


def assert_no_process_of(group):
    """The jobs of a killed run end too."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("jobs are still running")
