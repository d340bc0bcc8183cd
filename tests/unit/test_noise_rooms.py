"""Where noise comes from: published corpora, babble, rooms; nothing is on both sides of a split."""

import numpy as np
import pytest
import scipy.signal
import soundfile
from conftest import RATE, speech_like

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.corpus.level import active_power
from cmkt.corpus.mix import mix
from cmkt.corpus.noise import list_audio, recording_of
from cmkt.corpus.rooms import read_impulse_response, reverberate
from cmkt.errors import CmktError


def touch(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    "files",
    [
        ["DKITCHEN/ch01.wav", "DKITCHEN/ch16.wav", "demand/DKITCHEN_16k/ch03.wav"],
        ["audio/1-100032-A-0.wav", "train/1-100032-B-0.wav"],
        ["noise_fullband/door_Freesound_validated_431118_0.wav",
         "noise_fullband/door_Freesound_validated_431118_7.wav"],
        ["fold1/7061-6-0-0.wav", "fold1/7061-6-1-0.wav"],
        ["BGD_150203_010_CAF.CH1.wav", "BGD_150203_010_CAF.CH6.wav"],
        ["smallroom/Room001/Room001-00001.wav", "smallroom/Room001/Room001-00099.wav"],
    ],
)  # fmt: skip
def test_files_of_one_recording_are_known(files):
    assert len({recording_of(name) for name in files}) == 1
    assert len({recording_of(name) for name in files}) == 1


def test_other_files_are_recordings_of_their_own():
    names = ["babble.wav", "factory1.wav", "musan/noise/free-sound/noise-free-sound-0000.wav",
             "tr/011a0101_0.061105_401c020r_-0.061105.wav", "---1_cCGK4M.wav", "a/x.wav", "b/x.wav",
             "5-1-A-3.wav", "5-2-A-3.wav", "TBUS/ch01.wav", "TCAR/ch01.wav"]  # fmt: skip
    assert len({recording_of(name) for name in names}) == len(names)


def test_no_recording_is_on_two_sides(tmp_path):
    touch(tmp_path, [f"ENV{n:02d}/ch{c:02d}.wav" for n in range(18) for c in range(1, 17)])
    sides = {split: {recording_of(name) for name in list_audio(tmp_path, split)}
             for split in ("train", "valid", "test")}  # fmt: skip
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == 18
    assert all(sides.values())


def test_few_recordings_are_dealt_out(tmp_path):
    touch(tmp_path, ["babble.wav", "f16.wav", "volvo.wav"])  # as NoiseX-92, with fewer files
    sides = [list(list_audio(tmp_path, split)) for split in ("train", "valid", "test")]
    assert sorted(sum(sides, [])) == ["babble.wav", "f16.wav", "volvo.wav"]
    assert all(len(side) == 1 for side in sides)


def test_a_recording_sorted_into_both_sides_is_refused(tmp_path):
    touch(tmp_path, ["train/1-100032-A-0.wav", "test/1-100032-B-0.wav", "test/2-7-A-1.wav"])
    with pytest.raises(CmktError, match="ESC-50:100032 lies in the folder for train and in that"):
        list_audio(tmp_path, "train")


def test_split_folders_are_found_below_one_folder(tmp_path):
    touch(tmp_path, ["wham_noise/tr/a.wav", "wham_noise/cv/b.wav", "wham_noise/tt/c.wav"])
    assert list(list_audio(tmp_path, "test")) == ["wham_noise/tt/c.wav"]


def test_of_musan_the_noise_is_taken(tmp_path):
    touch(tmp_path, [f"musan/{k}/free/{k}-{n}.wav" for k in ("music", "noise", "speech")
                     for n in range(3)])  # fmt: skip
    assert list(list_audio(tmp_path)) == [f"musan/noise/free/noise-{n}.wav" for n in range(3)]


@pytest.fixture
def corpus(tmp_path):
    """Four speakers of two utterances, each speaker a pitch; noise; all below paths with blanks."""
    folder = tmp_path / "a corpus ä"
    (folder / "noise").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for n in range(4):
        soundfile.write(folder / "noise" / f"n {n}.wav", generator.normal(0, 0.1, RATE), RATE)
    wav, speakers = {}, {}
    for speaker in "abcd":
        for number in range(2):
            name = f"{speaker}{number}"
            wav[name], speakers[name] = str(folder / f"{name}.wav"), speaker
            soundfile.write(wav[name], speech_like(generator, 1.5), RATE, format="FLAC")
    DataDirectory(wav, speakers).write(folder)
    return folder


def test_babble_is_of_the_other_speakers_at_the_snr(corpus, tmp_path):
    mix(corpus, tmp_path / "out", None, snr="0", nj=2, babble_share=1, babble_talkers=(2, 3))
    data = DataDirectory.read(tmp_path / "out")
    for key, noise in read_table(tmp_path / "out" / "utt2noise").items():
        talkers = noise.removeprefix("babble:").split("+")
        assert 2 <= len(talkers) <= 3 and data.utt2spk[key] not in talkers
        mixture, clean = (soundfile.read(table[key])[0] for table in (data.wav, data.spk1))
        ratio = active_power(clean, RATE) / np.mean((mixture - clean) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(0, abs=0.1)


def test_babble_leaves_the_other_mixtures_as_they_are(corpus, tmp_path):
    mix(corpus, tmp_path / "some", corpus / "noise", nj=1, babble_share=0.5, babble_talkers=(1, 2))
    mix(corpus, tmp_path / "none", corpus / "noise", nj=1)
    some = read_table(tmp_path / "some" / "utt2noise")
    babble = {key for key, name in some.items() if name.startswith("babble:")}
    assert 0 < len(babble) < len(some)
    for key in some:
        pair = [soundfile.read(DataDirectory.read(tmp_path / folder).wav[key])[0]
                for folder in ("some", "none")]  # fmt: skip
        assert np.array_equal(*pair) == (key not in babble)


def test_babble_needs_speakers(corpus, tmp_path):
    with pytest.raises(CmktError, match="lower --babble_talkers"):
        mix(corpus, tmp_path / "out", None, nj=1, babble_share=1, babble_talkers=(4, 5))


def test_babble_does_without_the_unreadable(corpus, tmp_path):
    wav, speakers = {}, {}
    audio, _ = soundfile.read(corpus / "a0.wav")
    (tmp_path / "many").mkdir()
    for number in range(120):
        name = f"s{number % 3}-{number:03d}"
        wav[name], speakers[name] = str(tmp_path / "many" / f"{name}.wav"), f"s{number % 3}"
        soundfile.write(wav[name], audio[:3200], RATE)
    (tmp_path / "many" / "s0-003.wav").write_bytes(b"RIFF")
    DataDirectory(wav, speakers).write(tmp_path / "many")
    mix(tmp_path / "many", tmp_path / "out", None, nj=1, babble_share=1, babble_talkers=(2, 2))
    assert list(read_table(tmp_path / "out" / "skipped")) == ["s0-003"]
    assert len(read_table(tmp_path / "out" / "utt2noise")) == 119


def test_noise_among_the_speech_is_refused(corpus, tmp_path):
    table = (corpus / "wav.scp").read_text()
    (corpus / "wav.scp").write_text(table + f"e0 {corpus}/noise/n 1.wav\n")
    (corpus / "utt2spk").write_text((corpus / "utt2spk").read_text() + "e0 e\n")
    with pytest.raises(CmktError, match=r"wav\.scp:9: e0: is also noise of .*move the noise out"):
        mix(corpus, tmp_path / "out", corpus / "noise", nj=1)


def test_single_unreadable_files_are_skipped_and_more_stop(corpus, tmp_path):
    wav, speakers = {}, {}
    audio, _ = soundfile.read(corpus / "a0.wav")
    for number in range(200):
        name = f"u{number:03d}"
        wav[name], speakers[name] = str(tmp_path / "many" / f"{name}.wav"), "s"
        (tmp_path / "many").mkdir(exist_ok=True)
        soundfile.write(wav[name], audio[:3200], RATE)
    for name in ("u003", "u100"):
        (tmp_path / "many" / f"{name}.wav").write_bytes(b"RIFF")
    DataDirectory(wav, speakers).write(tmp_path / "many")
    mix(tmp_path / "many", tmp_path / "out", corpus / "noise", nj=2)
    assert len(read_table(tmp_path / "out" / "wav.scp")) == 198
    skipped = read_table(tmp_path / "out" / "skipped")
    assert list(skipped) == ["u003", "u100"] and "not readable as audio" in skipped["u003"]
    (tmp_path / "many" / "u150.wav").write_bytes(b"RIFF")
    with pytest.raises(CmktError, match="u003: not readable .*; 3 of 200 utterances cannot be"):
        mix(tmp_path / "many", tmp_path / "other", corpus / "noise", nj=2)
    assert not (tmp_path / "other").exists()


# Rooms


def room(seconds=0.4, delay=0.01):
    generator = np.random.default_rng(1)
    tail = generator.normal(size=int(seconds * RATE)) * np.exp(-np.arange(seconds * RATE) / 1500)
    return np.concatenate([np.zeros(int(delay * RATE)), [1.0], 0.1 * tail])


def test_reference_is_the_early_part_at_the_dry_level(tmp_path):
    soundfile.write(tmp_path / "r.wav", room(), RATE, subtype="FLOAT")
    response = read_impulse_response(tmp_path / "r.wav", RATE)
    assert np.abs(response).argmax() == round(0.002 * RATE)
    dry = speech_like(np.random.default_rng(0), 2.0)
    wet, early = reverberate(dry, response, RATE)
    assert active_power(early, RATE) == pytest.approx(active_power(dry, RATE), rel=1e-6)
    # What is not in the reference comes more than 50 ms after the direct sound.
    late = response.copy()
    late[: round(0.052 * RATE)] = 0
    first = scipy.signal.fftconvolve(dry, response - late)[: len(dry)]
    rest = scipy.signal.fftconvolve(dry, late)[: len(dry)]
    gain = np.dot(early, early) / np.dot(early, first)
    assert np.allclose(wet - early, gain * rest, atol=1e-6)
    whole = reverberate(dry, response, RATE, "reverberant")
    assert np.array_equal(*whole)


def test_mixtures_in_rooms(corpus, tmp_path):
    (tmp_path / "rooms").mkdir()
    for n in range(4):
        soundfile.write(tmp_path / "rooms" / f"r{n}.wav", room(), RATE, subtype="FLOAT")
    rooms = {"rir_dir": tmp_path / "rooms", "nj": 1, "snr": "30"}
    mix(corpus, tmp_path / "early", corpus / "noise", rir_share=1, **rooms)
    mix(
        corpus,
        tmp_path / "all",
        corpus / "noise",
        rir_share=1,
        rir_reference="reverberant",
        **rooms,
    )
    mix(corpus, tmp_path / "some", corpus / "noise", rir_share=0.5, **rooms)
    assert set(read_table(tmp_path / "early" / "utt2room")) == set(read_table(corpus / "wav.scp"))
    assert 0 < len(read_table(tmp_path / "some" / "utt2room")) < 8

    def distance(folder):
        data = DataDirectory.read(tmp_path / folder)
        both = [[soundfile.read(t[key])[0] for t in (data.wav, data.spk1)] for key in data.wav]
        return np.mean([np.mean((mixed - clean) ** 2) / np.mean(clean**2) for mixed, clean in both])

    assert distance("early") > 3 * distance("all")


def test_simulated_rooms_have_the_reverberation_time(tmp_path):
    pytest.importorskip("pyroomacoustics")
    command = ["simulate-rooms", "--rooms", "10", "--reverberation", "0.5", "0.5"]
    for name, nj in (("one", "1"), ("two", "2")):
        assert main([*command, "--output_dir", str(tmp_path / name), "--nj", nj]) == 0
    files = {
        side: sorted((tmp_path / "one" / side).iterdir()) for side in ("train", "valid", "test")
    }
    assert [len(files[side]) for side in ("train", "valid", "test")] == [7, 1, 2]
    times = []
    for path in sum(files.values(), []):
        other = tmp_path / "two" / path.parent.name / path.name
        assert path.read_bytes() == other.read_bytes()
        response = soundfile.read(path)[0]
        decay = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2) + 1e-12)
        start, end = (np.argmax(decay < level) for level in (-5, -25))
        times.append(3 * (end - start) / RATE)  # T20
    assert 0.3 < np.median(times) < 0.7
    before = files["train"][0].stat().st_mtime_ns
    assert main([*command, "--output_dir", str(tmp_path / "one")]) == 0
    assert files["train"][0].stat().st_mtime_ns == before
    assert main([*command[:-2], "0.9", "0.2", "--output_dir", str(tmp_path / "bad")]) == 1
