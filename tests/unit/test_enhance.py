import argparse
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml

from cmkt.cli import main
from cmkt.enhance import chunks, enhance, export
from cmkt.enhance.loading import Enhancer
from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import build_enhancement_model

CONFIG = {
    "config": "conf/train_blstm_cmkt.yaml",
    "encoder": "stft",
    "encoder_conf": {"n_fft": 128, "hop_length": 64},
    "separator": "rnn",
    "separator_conf": {"num_spk": 1, "layer": 1, "unit": 8, "rnn_type": "blstm"},
    "decoder": "stft",
    "decoder_conf": {"n_fft": 128, "hop_length": 64},
    "mask_module": "multi_mask",
    "mask_module_conf": {},
    "criterions": [{"name": "l1_fd", "conf": {}, "wrapper": "fixed_order", "wrapper_conf": {}}],
    "model_conf": {"normalize_variance": True},
    "num_spk": 1,
    "sample_rate": 16000,
    "init": "xavier_uniform",
    "seed": 3,
    "output_dir": "/somewhere/exp",
    "init_param": ["/somewhere/else.pth"],
    "train_data_path_and_name_and_type": [["dump/audio/train/wav.scp", "speech_mix", "sound"]],
    "transfer": "cmkt",
    "transfer_conf": {"alpha": 0.9},
    "linguistic_meta": {"model": "/somewhere/minilm", "revision": "1", "layer": -1},
}


def make_experiment(folder, config=CONFIG, seed=0):
    """Write what training leaves: config.yaml and the best weights, with ours among them."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    weights = build_enhancement_model(config).state_dict()
    weights["transfer.x"] = torch.zeros(3)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(weights, folder / "valid.loss_se.best.pth")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    experiment = make_experiment(tmp_path_factory.mktemp("model") / "exp" / "blstm_cmkt_seed3")
    assert main(["export", str(experiment)]) == 0
    return experiment / "export"


@pytest.fixture(scope="module")
def enhancer(exported):
    return Enhancer(exported)


def speech_like(seconds, rate=16000, seed=0, level=0.1):
    """Noise whose level rises and falls four times a second."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (level * noise * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def parse(*words):
    parser = argparse.ArgumentParser()
    enhance.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_export_drops_the_transfer_and_what_belongs_to_one_machine(exported):
    weights = torch.load(exported / "model.pth", weights_only=True)
    trained = torch.load(exported.parent / "valid.loss_se.best.pth", weights_only=True)
    assert set(trained) - set(weights) == {"transfer.x"}
    assert all(torch.equal(weights[name], trained[name]) for name in weights)
    config = (exported / "config.yaml").read_text()
    assert "transfer" not in config and "somewhere" not in config and "dump" not in config
    meta = yaml.safe_load((exported / "meta.yaml").read_text())
    assert meta["sample_rate"] == 16000 and meta["backbone"] == "rnn" and meta["seed"] == 3
    assert meta["llm"]["model"] == "minilm" and meta["data"] == {"train": "train"}
    assert meta["parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_export_fills_in_scores_without_touching_the_model(tmp_path):
    experiment = make_experiment(tmp_path / "exp")
    assert main(["export", str(experiment)]) == 0
    assert "Not scored yet" in (experiment / "export" / "README.md").read_text()
    before = (experiment / "export" / "model.pth").stat().st_mtime_ns
    (experiment / "scores" / "test").mkdir(parents=True)
    (experiment / "scores" / "test" / "summary.json").write_text(
        '{"n_utterances": 7, "metrics": {"pesq": {"mean": 2.5}, "stoi": {"mean": null}}}'
    )
    assert main(["export", str(experiment)]) == 0
    assert "| test | 7 | 2.500 | - |" in (experiment / "export" / "README.md").read_text()
    assert (experiment / "export" / "model.pth").stat().st_mtime_ns == before


def test_export_takes_the_average_first_and_redoes_when_it_changes(tmp_path):
    experiment = make_experiment(tmp_path / "exp")
    assert main(["export", str(experiment)]) == 0
    average = torch.load(experiment / "valid.loss_se.best.pth", weights_only=True)
    average = {name: tensor + 1 for name, tensor in average.items()}
    torch.save(average, experiment / "valid.loss_se.ave_3best.pth")
    (experiment / "valid.loss_se.ave.pth").symlink_to("valid.loss_se.ave_3best.pth")
    assert main(["export", str(experiment)]) == 0
    weights = torch.load(experiment / "export" / "model.pth", weights_only=True)
    assert all(torch.equal(weights[name], average[name]) for name in weights)
    meta = yaml.safe_load((experiment / "export" / "meta.yaml").read_text())
    assert meta["checkpoint"] == "valid.loss_se.ave_3best.pth"


def test_sample_rate_is_that_of_the_training_audio(tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(0.1), 16000)
    (tmp_path / "wav.scp").write_text(f"a {tmp_path}/a.wav\n")
    data = [[str(tmp_path / "wav.scp"), "speech_mix", "sound"]]
    config = {"sample_rate": 8000, "train_data_path_and_name_and_type": data}
    assert export.find_sample_rate(config) == 16000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: (e / "config.yaml").unlink(), "run stage 5"),
        (lambda e: (e / "valid.loss_se.best.pth").unlink(), "run stage 5"),
        (lambda e: (e / "valid.loss_se.best.pth").write_bytes(b"no"), "not readable as model"),
        (lambda e: _edit_weights(e, lambda w: w.pop(next(iter(w)))), "1 weights are missing"),
        (lambda e: _edit_weights(e, lambda w: w.update(a=torch.ones(1))), "1 weights are unexp"),
        (lambda e: _edit_config(e, separator="nothing"), "known: asteroid"),
        (lambda e: _edit_config(e, encoder_conf={"n_fft": 256}), "of another shape"),
        (lambda e: _edit_config(e, separator_conf={"colour": 1}), "cannot be built"),
    ],
)
def test_export_refuses_what_it_cannot_export(tmp_path, capsys, change, message):
    experiment = make_experiment(tmp_path / "exp")
    change(experiment)
    assert main(["export", str(experiment)]) == 1
    assert message in capsys.readouterr().err
    assert not (experiment / "export").exists()


def _edit_weights(experiment, change):
    weights = torch.load(experiment / "valid.loss_se.best.pth", weights_only=True)
    change(weights)
    torch.save(weights, experiment / "valid.loss_se.best.pth")


def _edit_config(experiment, **changes):
    (experiment / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))


@pytest.mark.parametrize("samples", [1, 40, 64, 65, 129, 4000, 4001])
def test_output_is_as_long_as_the_input_and_finite(enhancer, samples):
    enhanced = enhancer(speech_like(1)[:samples])
    assert enhanced.shape == (samples,) and np.isfinite(enhanced).all()


def test_level_is_kept(enhancer):
    speech = speech_like(1)
    assert np.allclose(enhancer(4 * speech), 4 * enhancer(speech), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_input_gives_silence(enhancer, value):
    assert np.abs(enhancer(np.full(4000, value, np.float32))).max() < 1e-3


@pytest.mark.parametrize(("rate", "channels", "name", "subtype"), [
    (16000, 1, "a.wav", "PCM_16"), (44100, 2, "a.wav", "PCM_24"), (8000, 1, "a.flac", "PCM_16"),
    (48000, 1, "a.wav", "FLOAT"), (16000, 3, "a.wav", "PCM_16"), (22050, 1, "a.mp3", None),
    (16000, 1, "a.ogg", "VORBIS"),
])  # fmt: skip
def test_file_keeps_rate_channels_length_and_format(
    exported, tmp_path, rate, channels, name, subtype
):
    speech = np.stack([speech_like(0.713, rate, seed) for seed in range(channels)], axis=1)
    speech[:, channels - 1] *= channels == 1  # a silent last channel
    soundfile.write(tmp_path / name, speech, rate, subtype)
    assert main(["enhance", str(exported), f"{tmp_path}/{name}", "-o", f"{tmp_path}/out"]) == 0
    given, made = soundfile.info(tmp_path / name), soundfile.info(tmp_path / "out" / name)
    for key in ("frames", "samplerate", "channels", "format", "subtype"):
        assert getattr(given, key) == getattr(made, key)
    enhanced = soundfile.read(tmp_path / "out" / name, always_2d=True)[0]
    assert np.isfinite(enhanced).all() and enhanced[:, 0].std() > 0
    if channels > 1:
        assert not enhanced[:, -1].any()


def test_float_file_holds_exactly_what_the_model_gives(enhancer, tmp_path):
    speech = speech_like(3)
    soundfile.write(tmp_path / "a.wav", speech, 16000, "FLOAT")
    chunks.enhance_file(enhancer, tmp_path / "a.wav", tmp_path / "b.wav")
    written = soundfile.read(tmp_path / "b.wav", dtype="float32")[0]
    assert np.array_equal(written, enhancer(speech))


class Passing:
    """Gives back its input, so that what the segments are cut and joined to can be seen."""

    sample_rate = 16000
    normalises = True

    def __init__(self):
        self.calls = []

    def __call__(self, speech, scale=None):
        self.calls.append((len(speech), scale))
        return speech.copy()


@pytest.mark.parametrize("seconds", [30.0001, 58, 58.01, 100])
def test_segments_join_without_a_seam(tmp_path, seconds):
    speech = speech_like(seconds)
    soundfile.write(tmp_path / "a.wav", speech, 16000, "FLOAT")
    model = Passing()
    done = []
    chunks.enhance_file(model, tmp_path / "a.wav", tmp_path / "b.wav", done.append)
    joined = soundfile.read(tmp_path / "b.wav", dtype="float32")[0]
    assert len(joined) == len(speech) and np.abs(joined - speech).max() < 1e-6
    lengths, scales = zip(*model.calls, strict=True)
    assert len(lengths) > 1 and max(lengths) <= 30 * 16000 and max(lengths) - min(lengths) < 10
    assert np.allclose(scales, speech.std(ddof=1), rtol=1e-5)
    assert sum(done) == pytest.approx(len(speech) / 16000)


def test_long_file_at_another_rate_keeps_time(tmp_path):
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(35 * 44100) / 44100)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", tone, 44100, "FLOAT")
    chunks.enhance_file(Passing(), tmp_path / "a.wav", tmp_path / "b.wav")
    back, rate = soundfile.read(tmp_path / "b.wav", dtype="float32")
    assert rate == 44100 and len(back) == len(tone)
    assert np.abs(back - tone)[1000:-1000].max() < 1e-3


def test_real_model_in_segments_is_close_to_the_whole(enhancer, tmp_path):
    speech = speech_like(40)
    soundfile.write(tmp_path / "a.wav", speech, 16000, "FLOAT")
    chunks.enhance_file(enhancer, tmp_path / "a.wav", tmp_path / "b.wav")
    pieces = soundfile.read(tmp_path / "b.wav", dtype="float32")[0]
    assert np.abs(pieces - enhancer(speech)).max() < 0.02 * speech.std()


def test_clipping_is_told_and_wraps_nothing(tmp_path):
    class Louder(Passing):
        def __call__(self, speech, scale=None):
            return 3 * speech

    soundfile.write(tmp_path / "a.wav", np.array([0.1, 0.5, -0.5], np.float32), 16000)
    remarks = chunks.enhance_file(Louder(), tmp_path / "a.wav", tmp_path / "b.wav")
    assert len(remarks) == 1 and "b.wav: 2 samples clipped" in remarks[0]
    written = soundfile.read(tmp_path / "b.wav")[0]
    assert written == pytest.approx([0.3, 1, -1], abs=1e-3)


@pytest.fixture
def corpus(tmp_path):
    """A list of four files, as stage 2 leaves it."""
    folder = tmp_path / "dump"
    folder.mkdir()
    lines = []
    for index in range(4):
        path = folder / f"file{index}.wav"
        soundfile.write(path, speech_like(0.2 + 0.1 * index, seed=index), 16000)
        lines.append(f"utt{index} {path}\n")
    (folder / "wav.scp").write_text("".join(lines))
    return folder


def test_scp_gives_a_folder_of_its_own_that_does_not_depend_on_nj(exported, corpus, tmp_path):
    outs = tmp_path / "one", tmp_path / "two"
    for nj, out in enumerate(outs, 1):
        enhance.run(parse(exported, corpus / "wav.scp", "-o", out, "--nj", nj))
        table = [line.split() for line in (out / "wav.scp").read_text().splitlines()]
        assert table == [[f"utt{i}", f"{out}/utt{i}.wav"] for i in range(4)]
    for index in range(4):
        first, second = ((out / f"utt{index}.wav").read_bytes() for out in outs)
        assert first == second
        assert soundfile.info(outs[0] / f"utt{index}.wav").frames == 3200 + 1600 * index


def test_scp_again_does_nothing_and_changed_audio_is_redone(exported, corpus, tmp_path, capsys):
    command = parse(exported, corpus / "wav.scp", "-o", tmp_path / "out")
    enhance.run(command)
    stamp = (tmp_path / "out" / "utt0.wav").stat().st_mtime_ns
    enhance.run(command)
    assert "up to date" in capsys.readouterr().out
    assert (tmp_path / "out" / "utt0.wav").stat().st_mtime_ns == stamp
    soundfile.write(corpus / "file0.wav", speech_like(0.5), 16000)
    enhance.run(command)
    assert soundfile.info(tmp_path / "out" / "utt0.wav").frames == 8000


def test_scp_goes_on_after_a_failure_and_resumes(exported, corpus, tmp_path, capsys):
    whole = (corpus / "file1.wav").read_bytes()
    nan = np.full(1000, np.nan, np.float32)
    soundfile.write(corpus / "file1.wav", nan, 16000, "FLOAT")
    (corpus / ".done.json").write_text('{"fingerprint": "a stage made this list"}')
    command = parse(exported, corpus / "wav.scp", "-o", tmp_path / "out")
    with pytest.raises(CmktError, match="1 of 4 files failed.*file1.wav"):
        enhance.run(command)
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.work" / "utt3.wav"
    stamp = kept.stat().st_mtime_ns
    (corpus / "file1.wav").write_bytes(whole)
    enhance.run(command)
    assert (tmp_path / "out" / "utt3.wav").stat().st_mtime_ns == stamp
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_scp_never_replaces_a_folder_of_the_users(exported, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CmktError, match="holds other files"):
        enhance.run(parse(exported, corpus / "wav.scp", "-o", tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_folder_keeps_its_structure_and_is_resumed(exported, tmp_path, capsys):
    given, out = tmp_path / "given", tmp_path / "given" / "enhanced"
    (given / "a" / "b").mkdir(parents=True)
    for name in ("x.wav", "a/x.wav", "a/b/y.FLAC"):
        soundfile.write(given / name, speech_like(0.2), 16000, format=name[-4:].strip("."))
    (given / "notes.txt").write_text("not audio")
    (given / "phone.m4a").write_bytes(b"not readable by libsndfile")
    command = parse(exported, given, "-o", out)
    enhance.run(command)
    assert "1 files left out" in capsys.readouterr().err
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.suffix}
    assert made == {"x.wav", "a/x.wav", "a/b/y.FLAC"}
    stamp = (out / "x.wav").stat().st_mtime_ns
    (out / "a" / "x.wav").unlink()
    enhance.run(command)
    assert (out / "a" / "x.wav").exists() and (out / "x.wav").stat().st_mtime_ns == stamp
    enhance.run(command)
    assert "up to date" in capsys.readouterr().out


def test_existing_files_are_replaced_only_when_told(exported, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(0.2), 16000)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.wav").write_text("mine")
    command = [exported, tmp_path / "a.wav", "-o", tmp_path / "out"]
    with pytest.raises(CmktError, match="already there"):
        enhance.run(parse(*command))
    assert (tmp_path / "out" / "a.wav").read_text() == "mine"
    enhance.run(parse(*command, "--overwrite"))
    assert soundfile.info(tmp_path / "out" / "a.wav").frames == 3200


def _bad(tmp_path, name):
    good = tmp_path / "good.wav"
    soundfile.write(good, speech_like(0.2), 16000)
    paths = {name: tmp_path / name for name in ("text.wav", "empty.wav", "no.wav")}
    paths["text.wav"].write_text("not audio")
    soundfile.write(paths["empty.wav"], np.zeros(0), 16000)
    (tmp_path / "twin").mkdir()
    shutil.copy(good, tmp_path / "twin")
    (tmp_path / "nothing").mkdir()
    scps = {
        "pipe.scp": "a cat x |\n",
        "missing.scp": f"a {good}\nb no.wav\n",
        "path.scp": f"../a {good}\n",
        "twice.scp": f"a {good}\na {good}\n",
        "none.scp": "",
    }
    for scp, content in scps.items():
        (tmp_path / scp).write_text(content)
    return {
        "twin": [good, tmp_path / "twin"],
        "mixed": [good, tmp_path / "pipe.scp"],
    }.get(name, [tmp_path / name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.wav", "text.wav: not readable as audio"),
        ("empty.wav", "empty.wav: empty audio file"),
        ("no.wav", "no.wav: no such file or folder"),
        ("nothing", "no audio files in it"),
        ("twin", "two inputs would get this name"),
        ("mixed", "cannot be mixed"),
        ("pipe.scp", "pipe.scp:1: a pipe"),
        ("missing.scp", "missing.scp:2: no such audio file"),
        ("path.scp", "path.scp:1: id '../a' cannot be a file name"),
        ("twice.scp", "twice.scp:2: id a comes twice"),
        ("none.scp", "no utterances"),
    ],
)
def test_bad_input_is_named_before_anything_is_made(exported, tmp_path, capsys, name, message):
    inputs = [str(path) for path in _bad(tmp_path, name)]
    assert main(["enhance", str(exported), *inputs, "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_truncated_file_is_named_and_leaves_nothing(exported, tmp_path, capsys):
    path = tmp_path / "cut.flac"
    soundfile.write(path, speech_like(2), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["enhance", str(exported), str(path), "-o", str(tmp_path / "out")]) == 1
    assert "cut.flac" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "out").iterdir() if p.name != ".enhanced"]


def test_input_is_never_overwritten(exported, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(0.2), 16000)
    for given in (tmp_path, tmp_path / "a.wav"):
        with pytest.raises(CmktError, match="would overwrite its input"):
            enhance.run(parse(exported, given, "-o", tmp_path, "--overwrite"))


def test_incomplete_export_is_named(exported, tmp_path):
    soundfile.write(tmp_path / "a.wav", speech_like(0.2), 16000)
    rest = (tmp_path / "a.wav", "-o", tmp_path / "out")
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "model.pth").unlink()
    with pytest.raises(CmktError, match="no model.pth in it"):
        enhance.run(parse(copy, *rest))
    with pytest.raises(CmktError, match=f"give {exported}"):
        enhance.run(parse(exported.parent, *rest))
    with pytest.raises(CmktError, match="no such model folder"):
        enhance.run(parse(tmp_path / "absent", *rest))


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from cmkt.cli import main\n"
        "for verb in ('export', 'enhance'):\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, capture_output=True)
