"""On-the-fly mixing: drawn from seed, epoch and utterance alone; the settings do what they say."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import RATE, REPOSITORY, speech_like, tiny_config, write_config

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.corpus.mix import mix
from cmkt.corpus.rooms import read_impulse_response
from cmkt.errors import CmktError
from cmkt.espnet_plugin.mixing import CODECS, build_mixing, codec, read_mixing_config, seeded
from cmkt.espnet_plugin.train import fit_sample_rate

ALL = REPOSITORY / "conf" / "mixing" / "all.yaml"


@pytest.fixture(scope="module")
def online(tmp_path_factory) -> Path:
    """A directory of `cmkt mix --online`, with noise and rooms."""
    root = tmp_path_factory.mktemp("on line")  # blanks in paths must work
    generator = np.random.default_rng(0)
    for side in ("train", "test"):
        for folder in ("noise", "rooms"):
            (root / folder / side).mkdir(parents=True)
        for n, rate in enumerate((RATE, 22050)):
            soundfile.write(root / "noise" / side / f"{side}{n}.wav",
                            generator.normal(0, 0.1, rate), rate)  # fmt: skip
        response = np.concatenate([np.zeros(800), 0.9 * np.exp(-np.arange(8000) / 1500)])
        response[801:] *= generator.normal(size=7999)
        soundfile.write(root / "rooms" / side / f"{side}.wav", response, RATE)
    (root / "audio").mkdir()
    wav = {}
    for number in range(6):
        path = root / "audio" / f"u{number}.flac"
        rate = RATE if number else 24000
        soundfile.write(path, speech_like(generator, 1 + 0.1 * number), rate)
        wav[f"u{number}"] = str(path)
    DataDirectory(wav, dict.fromkeys(wav, "s"), text={"u1": "WORDS"}).write(root)
    mix(root, root / "train", root / "noise", "train", rir_dir=root / "rooms", nj=1, online=True)
    return root


def build(online, seed=0, **conf):
    settings = {"noise_db_range": "0_10", "short_noise_thres": 0.0, **conf}
    rooms = str(online / "train" / "rir.scp")
    return build_mixing(settings, str(online / "train" / "noise.scp"), rooms, RATE, seed)


def draw(preprocess, online, utterance="u1"):
    clean, _ = soundfile.read(DataDirectory.read(online / "train").wav[utterance], dtype="float32")
    data = preprocess(utterance, {"speech_mix": clean, "speech_ref1": clean.copy()})
    return data["speech_mix"], data["speech_ref1"], clean


def test_only_what_has_another_rate_is_converted(online):
    data = DataDirectory.read(online / "train")
    assert data.wav == data.spk1 and data.text == {"u1": "WORDS"}
    assert data.wav["u1"] == str(online / "audio" / "u1.flac")
    assert data.wav["u0"] != str(online / "audio" / "u0.flac")
    noise = read_table(online / "train" / "noise.scp")
    assert list(noise) == ["train/train0.wav", "train/train1.wav"]
    for path in [*data.wav.values(), *noise.values()]:
        assert soundfile.info(path).samplerate == RATE


def test_a_mixture_depends_on_seed_epoch_and_utterance_alone(online):
    conf = read_mixing_config(ALL)
    one, other = build(online, **conf), build(online, **conf)
    first = [draw(one, online, f"u{n}")[0] for n in range(1, 6)]
    backwards = [draw(other, online, f"u{n}")[0] for n in range(5, 0, -1)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, backwards, strict=True))
    other.epoch = 1
    again, different = draw(one, online)[0], draw(other, online)[0]
    assert np.array_equal(again, first[0])
    assert len(different) != len(again) or not np.array_equal(different, again)
    reseeded = draw(build(online, seed=1, **conf), online)[0]
    assert len(reseeded) != len(again) or not np.array_equal(reseeded, again)


def test_the_random_generators_are_put_back():
    np.random.seed(3)
    expected = np.random.random(2), torch.rand(1, generator=torch.manual_seed(3))
    np.random.seed(3)
    torch.manual_seed(3)
    first = np.random.random()
    with seeded("anything"):
        np.random.random(5), torch.rand(5)
    assert [first, np.random.random()] == list(expected[0])
    assert torch.rand(1) == expected[1]


def test_noise_has_the_snr_and_the_reference_stays_clean(online):
    mixture, reference, clean = draw(build(online, noise_db_range="5", rir_apply_prob=0.0), online)
    scale = np.dot(reference, clean) / np.dot(clean, clean)  # one factor where it would clip
    assert np.allclose(reference, scale * clean, atol=1e-6)
    ratio = 10 * np.log10(np.mean(reference**2) / np.mean((mixture - reference) ** 2))
    assert 2 < ratio < 5.1  # ESPnet's level is that of the speech where it is not silent


def test_speed_changes_the_length_of_both(online):
    mixture, reference, clean = draw(build(online, speed=[0.8], rir_apply_prob=0.0), online)
    assert len(mixture) == len(reference) == pytest.approx(len(clean) / 0.8, abs=2)


def test_the_reference_in_a_room_keeps_the_early_part_only(online):
    early = draw(build(online, rir_apply_prob=1.0, noise_apply_prob=0.0), online)
    whole = draw(build(online, rir_apply_prob=1.0, noise_apply_prob=0.0, use_reverberant_ref=True),
                 online)  # fmt: skip
    assert np.allclose(whole[0], whole[1], atol=1e-5)
    assert not np.allclose(early[0], early[1], atol=1e-2)
    response = read_impulse_response(read_table(online / "train" / "rir.scp")["train/train.wav"],
                                     RATE)  # fmt: skip
    assert np.abs(response).argmax() <= 0.002 * RATE


@pytest.mark.parametrize("path", sorted(ALL.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_that_comes_with_cmkt_works(online, path):
    preprocess = build(online, **read_mixing_config(path))
    for utterance in range(1, 6):
        mixture, reference, _ = draw(preprocess, online, f"u{utterance}")
        assert mixture.shape == reference.shape and np.isfinite(mixture).all()
        assert not np.array_equal(mixture, reference)


@pytest.mark.parametrize("name", CODECS)
def test_codec_keeps_length_and_likeness(name):
    wave = torch.from_numpy(speech_like(np.random.default_rng(0), 1.0))
    coded = codec(wave, RATE, name)
    assert coded.shape == wave.shape and not torch.equal(coded, wave)
    both = np.stack([wave.numpy(), coded.numpy()])
    lags = [np.corrcoef(both[0][2000:-2000], np.roll(both[1], -lag)[2000:-2000])[0, 1]
            for lag in range(0, 1400, 2)]  # fmt: skip
    assert max(lags) > 0.7


@pytest.mark.parametrize(
    "text, what",
    [("{}", "no settings"), ("- 1", "not a YAML mapping"),
     ("nois_db_range: 0_5", "unknown key nois_db_range"),
     ("data_aug_effects: [[1.0, codecs, {}]]", "unknown effect codecs"),
     ("noise_scp: x", "unknown key noise_scp")],
)  # fmt: skip
def test_wrong_settings_are_named(tmp_path, text, what):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(CmktError, match=what):
        read_mixing_config(tmp_path / "m.yaml")


def train(online, mixtures, statistics, config, output, *more):
    return main([
        "train", "--config", str(config), "--output_dir", str(output), "--seed", "1",
        "--train_dir", str(online / "train"), "--valid_dir", str(mixtures / "audio" / "valid"),
        "--stats_dir", str(statistics), *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def online_statistics(online, mixtures):
    output = online / "stats"
    assert main(["train", "--collect_stats", "true", "--output_dir", str(output), "--train_dir",
                 str(online / "train"), "--valid_dir",
                 str(mixtures / "audio" / "valid")]) == 0  # fmt: skip
    return output


def weights(output, epoch=2):
    return torch.load(output / f"{epoch}epoch.pth", weights_only=True)


def test_training_is_the_same_with_workers_and_after_a_resume(
    online, mixtures, online_statistics, tmp_path
):
    config = write_config(tmp_path / "c.yaml", tiny_config())
    mixing = ["--mixing_config", str(ALL)]
    shared = (online, mixtures, online_statistics, config)
    assert train(*shared, tmp_path / "whole", *mixing) == 0
    assert train(*shared, tmp_path / "workers", *mixing, "--num_workers", "2") == 0
    assert train(*shared, tmp_path / "resumed", *mixing, "--max_epoch", "1") == 0
    assert train(*shared, tmp_path / "resumed", *mixing) == 0
    expected = weights(tmp_path / "whole")
    for name in ("workers", "resumed"):
        got = weights(tmp_path / name)
        assert all(torch.equal(expected[key], got[key]) for key in expected), name
    conf = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert conf["mixing_conf"]["noise_db_range"] == "-5_15" and "noise.scp" in conf["noise_scp"]


def test_online_data_and_settings_belong_together(
    online, mixtures, online_statistics, tmp_path, capsys
):
    config = write_config(tmp_path / "c.yaml", tiny_config())
    assert train(online, mixtures, online_statistics, config, tmp_path / "x") == 1
    assert "give --mixing_config" in capsys.readouterr().err
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "x"),
                 "--train_dir", str(mixtures / "audio" / "train"),
                 "--mixing_config", str(ALL)]) == 1  # fmt: skip
    assert "cmkt mix --online" in capsys.readouterr().err


# Sampling rates


@pytest.mark.parametrize("fs, n_fft", [(8000, 64), (24000, 192), (48000, 384)])
def test_a_configuration_is_scaled_to_the_rate_of_the_data(
    fs, n_fft, online, mixtures, online_statistics, tmp_path
):
    marker = mixtures / "audio" / "train" / ".done.json"
    made = json.loads(marker.read_text())
    assert made["options"]["fs"] == RATE
    data = tmp_path / "data"
    data.mkdir()
    for name in ("wav.scp", "spk1.scp"):
        (data / name).write_text((mixtures / "audio" / "train" / name).read_text())
    made["options"]["fs"] = fs
    (data / ".done.json").write_text(json.dumps(made))
    config = write_config(tmp_path / "c.yaml", tiny_config(sample_rate=16000, max_epoch=1))
    shapes = [
        "--train_shape_file",
        str(data / "shapes"),
        "--valid_shape_file",
        str(data / "shapes"),
    ]
    lines = [f"{line.split()[0]} 16000" for line in (data / "wav.scp").read_text().splitlines()]
    (data / "shapes").write_text("\n".join(lines) + "\n")
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "x"),
                 "--train_dir", str(data), "--valid_dir", str(data), *shapes]) == 0  # fmt: skip
    conf = yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())
    assert conf["sample_rate"] == fs
    assert conf["encoder_conf"] == conf["decoder_conf"] == {
        "n_fft": n_fft, "hop_length": n_fft // 2}  # fmt: skip


def options(separator: str, fs: int = 16000, n_fft: int = 512, **separator_conf):
    """Return the options that depend on the sampling rate."""
    return Namespace(
        encoder_conf={"n_fft": n_fft},
        decoder_conf={},
        separator=separator,
        separator_conf=separator_conf,
        criterions=[{"name": "consistency", "conf": {"n_fft": n_fft}}, {"name": "l1_fd"}],
        fold_length=[],
        batch_bins=16000,
        valid_batch_bins=None,
        sample_rate=fs,
    )


def test_a_rate_that_does_not_fit_is_named():
    with pytest.raises(CmktError, match="n_fft 100 at 16000 Hz is no whole number at 11025 Hz"):
        fit_sample_rate(options("rnn", n_fft=100), 11025, True)
    for separator in ("bsrnn", "svoice"):
        fit_sample_rate(options(separator), 16000, True)
        with pytest.raises(CmktError, match=f"{separator} is laid out for 16000 Hz"):
            fit_sample_rate(options(separator), 8000, True)


def test_what_a_separator_has_of_the_rate_is_scaled_too():
    args = options("tfgridnetv2", n_fft=512, stride=64)
    fit_sample_rate(args, 8000, True)
    assert (args.encoder_conf["n_fft"], args.separator_conf["stride"]) == (256, 32)
    assert args.criterions[0]["conf"]["n_fft"] == 256
    args = options("gtcrn", sample_rate=16000)
    fit_sample_rate(args, 48000, True)
    assert args.separator_conf["sample_rate"] == args.sample_rate == 48000
