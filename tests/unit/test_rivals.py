"""The rivals without text: frozen encoders and recognisers as criterions, and their training."""

import json
import random

import numpy as np
import pytest
import soundfile
import torch
import yaml
from speech_models import KINDS, make_encoder, make_recogniser

from cmkt.cli import main
from cmkt.errors import CmktError
from cmkt.espnet_plugin.criterions import MimicLoss, SpeechEncoderLoss
from cmkt.espnet_plugin.ctc import load_recogniser
from cmkt.espnet_plugin.rivals import fill_sample_rate, without_rivals
from cmkt.espnet_plugin.speech_encoder import find_encoder, load_encoder
from cmkt.espnet_plugin.train_recogniser import spoken

LENGTHS = (8000, 4500, 6789)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {kind: make_encoder(kind, root / kind) for kind in KINDS}
    return {**made, "mimic": make_recogniser(root / "recogniser")}


def speech(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(length, generator=generator) + 0.01 for length in LENGTHS]


def padded(signals: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)


def criterion(models, kind: str, **conf):
    if kind == "mimic":
        return MimicLoss(str(models["mimic"]), **conf)
    return SpeechEncoderLoss(str(models[kind]), **{"layer": 2, **conf})


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gets_what_transformers_makes_of_each_utterance_alone(models, kind, layer):
    from transformers import AutoFeatureExtractor, AutoModel

    found = load_encoder(find_encoder(str(models[kind]), layer))
    extractor = AutoFeatureExtractor.from_pretrained(models[kind])
    model = AutoModel.from_pretrained(models[kind]).eval()
    signals = speech()
    with torch.no_grad():
        states, frames = found(padded(signals), torch.tensor(LENGTHS))
        for number, signal in enumerate(signals):
            inputs = extractor(signal.numpy(), sampling_rate=16000, return_tensors="pt")
            encoder = model.get_encoder() if kind == "Whisper" else model
            values = inputs["input_features" if kind == "Whisper" else "input_values"]
            wanted = encoder(values, output_hidden_states=True).hidden_states[layer][0]
            count = frames[number]
            # 320 samples a frame, whole ones but for Whisper.
            assert count == (-(-LENGTHS[number] // 320) if kind == "Whisper" else len(wanted))
            torch.testing.assert_close(states[number, :count], wanted[:count], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "mimic"])
def test_loss_is_zero_for_equal_signals_and_its_gradient_reaches_the_waveform_only(models, kind):
    loss = criterion(models, kind)
    clean, enhanced = padded(speech(0)), padded(speech(1)).requires_grad_()
    assert torch.equal(loss(clean, clean), torch.zeros(3))
    losses = loss(clean, enhanced)
    assert (losses > 1e-4).all()
    losses.sum().backward()
    assert all(
        (row[:length] != 0).any() for row, length in zip(enhanced.grad, LENGTHS, strict=True)
    )
    network = loss._network(torch.device("cpu"))
    assert not network.training
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    # Neither an optimiser nor a checkpoint sees the network.
    assert not list(loss.parameters()) and not loss.state_dict()


@pytest.mark.parametrize("kind", [*KINDS, "mimic"])
def test_padding_and_what_is_enhanced_there_change_nothing(models, kind):
    loss = criterion(models, kind)
    clean, enhanced = speech(0), speech(1)
    together = loss(padded(clean), padded(enhanced) + 0)
    noisy = padded(enhanced)
    noisy[1, LENGTHS[1] :] = 3.0
    torch.testing.assert_close(loss(padded(clean), noisy), together)
    alone = [loss(c[None], e[None])[0] for c, e in zip(clean, enhanced, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "mimic"])
def test_silent_and_short_references_are_finite(models, kind):
    loss = criterion(models, kind)
    clean, enhanced = torch.zeros(2, 300), torch.randn(2, 300).requires_grad_()
    clean[1, :200] = 0.1
    losses = loss(clean, enhanced)
    losses.sum().backward()
    assert losses[0] == 0 and losses.isfinite().all() and enhanced.grad.isfinite().all()


def test_the_mean_is_over_valid_frames_of_the_distance(models):
    network = load_recogniser(models["mimic"])
    clean, enhanced = speech(0), speech(1)
    with torch.no_grad():
        wanted, found = (
            network(x[1][None], torch.tensor([LENGTHS[1]]))[0][0] for x in (clean, enhanced)
        )
    log_posteriors = wanted.log_softmax(-1), found.log_softmax(-1)
    expected = {
        "mse": ((found - wanted) ** 2).mean(),
        "l1": (found - wanted).abs().mean(),
        "kl": (log_posteriors[0].exp() * (log_posteriors[0] - log_posteriors[1])).sum(-1).mean(),
    }
    for distance, value in expected.items():
        loss = MimicLoss(str(models["mimic"]), distance)(padded(clean), padded(enhanced))[1]
        torch.testing.assert_close(loss, value, atol=1e-6, rtol=1e-4)


def test_cosine_ignores_the_size_of_a_frame():
    from cmkt.espnet_plugin.criterions import DISTANCES

    one, other = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
    assert DISTANCES["cosine"](2 * one, other).item() == pytest.approx(1 - 24 / 25)


@pytest.mark.parametrize("kind", ["WavLM", "mimic"])
def test_another_sampling_rate_is_converted(models, kind):
    """Speech at 8 kHz is compared as what it is at 16 kHz, where its upper half is empty."""
    time = torch.arange(16000) / 16000
    clean = torch.stack([torch.sin(2 * torch.pi * f * time) for f in (500, 700)])
    enhanced = clean + 0.3 * torch.sin(2 * torch.pi * 1500 * time)
    wide = criterion(models, kind)(clean, enhanced)
    narrow = criterion(models, kind, fs=8000)(clean[:, ::2], enhanced[:, ::2])
    torch.testing.assert_close(narrow, wide, rtol=0.1, atol=0)


def test_loading_leaves_the_random_numbers_alone(models):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    criterion(models, "WavLM")(padded(speech()), padded(speech(1)))
    assert torch.equal(torch.rand(1), expected)


def no_extractor(folder):
    (make_encoder("WavLM", folder) / "preprocessor_config.json").unlink()
    return SpeechEncoderLoss(str(folder))


def bert(folder):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(**sizes, intermediate_size=8, vocab_size=10)).save_pretrained(folder)
    extractor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    return SpeechEncoderLoss(str(folder))


WRONG = {
    "no such model folder": lambda folder, models: SpeechEncoderLoss("/nowhere"),
    "speech_encoder.layer: 4, but the model has 3": lambda folder, models: criterion(
        models, "WavLM", layer=4
    ),
    "speech_encoder.layer: 'six'": lambda folder, models: criterion(models, "WavLM", layer="six"),
    "speech_encoder.distance must be one of": lambda folder, models: criterion(
        models, "WavLM", distance="kl"
    ),
    "speech_encoder.fs": lambda folder, models: criterion(models, "WavLM", fs="16k"),
    "bert is no encoder of waveforms": lambda folder, models: bert(folder),
    "no preprocessor_config.json": lambda folder, models: no_extractor(folder),
    "no finished recogniser": lambda folder, models: MimicLoss(str(folder)),
    "mimic.distance must be one of": lambda folder, models: criterion(
        models, "mimic", distance="cosine"
    ),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_settings_are_refused_when_the_criterion_is_built(models, tmp_path, words):
    with pytest.raises((CmktError, ValueError)) as error:
        WRONG[words](tmp_path / "model", models)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_without_some_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = make_encoder("WavLM", tmp_path / "model") / "model.safetensors"
    weights = load_file(path)
    lost = next(name for name in weights if "layers.1" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, path, {"format": "pt"})
    loss = SpeechEncoderLoss(str(tmp_path / "model"))
    with pytest.raises(CmktError, match="the weights lack 1 parameters"):
        loss(padded(speech()), padded(speech(1)))


def test_the_yaml_of_rivals():
    mine = {"name": "mimic", "conf": {"recogniser": "r"}}
    stock = {"name": "l1_fd", "conf": {}}
    filled = fill_sample_rate([stock, mine, {"name": "speech_encoder", "conf": {"fs": 1}}], 8000)
    assert [c["conf"].get("fs") for c in filled] == [None, 8000, 1]
    assert "fs" not in mine["conf"]
    assert without_rivals(filled) == [stock]
    with pytest.raises(CmktError, match="accompany an enhancement loss"):
        fill_sample_rate([mine], 8000)


# A language of tones: each letter has its own.
TONES = {"a": 300, "b": 600, "c": 1200, "d": 2400, "好": 4800}


def tones(word: str, generator: np.random.Generator) -> np.ndarray:
    silence = np.zeros(640)
    time = np.arange(1600) / 16000
    parts = [np.concatenate([np.sin(2 * np.pi * TONES[c] * time), silence]) for c in word]
    return 0.1 * np.concatenate(parts) + generator.normal(0, 1e-3, 2240 * len(word))


def mixture_directory(folder, count: int, seed: int):
    """Write clean speech of words of tones as stage 2 leaves it."""
    folder.mkdir(parents=True)
    generator, choices = np.random.default_rng(seed), random.Random(seed)
    scp, text = [], []
    for number in range(count):
        word = "".join(choices.choices(list(TONES), k=choices.randint(3, 6)))
        path = folder / f"{number:03}.wav"
        soundfile.write(path, tones(word, generator), 16000)
        scp.append(f"u{number:03} {path}\n")
        text.append(f"u{number:03} {word.upper()}!\n")
    (folder / "spk1.scp").write_text("".join(scp))
    (folder / "text").write_text("".join(text[:-1]), encoding="utf-8")  # the last one has none
    return folder


def train_recogniser(root, *more, output="recogniser") -> int:
    return main([
        "train-recogniser", "--train_dir", str(root / "train"), "--valid_dir", str(root / "valid"),
        "--output_dir", str(root / output), "--width", "32", "--blocks", "2", *map(str, more)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    mixture_directory(root / "train", 121, 0)
    mixture_directory(root / "valid", 13, 1)
    assert train_recogniser(root, "--max_epoch", 12, "--learning_rate", 0.01) == 0
    return root


def test_the_recogniser_learns_and_the_criterion_takes_it(toy):
    folder = toy / "recogniser"
    meta = yaml.safe_load((folder / "meta.yaml").read_text())
    assert meta["train_utterances"] == 120 and meta["characters"] == sorted(TONES)
    assert meta["valid_loss_by_epoch"][0] > 3 * meta["valid_loss"]
    assert meta["valid_character_error_rate"] < 0.1
    word = "acdb好a"
    signal = torch.from_numpy(tones(word, np.random.default_rng(9))).float()[None]
    model = load_recogniser(folder)
    with torch.inference_mode():
        assert model.decode(*model(signal, torch.tensor([signal.shape[1]]))) == [word]
    loss = MimicLoss(str(folder))
    other = torch.from_numpy(tones("bcdb好c", np.random.default_rng(9))).float()[None]
    quieter, misheard = loss(signal, 0.3 * signal), loss(signal, other)
    assert misheard > 1000 * quieter  # the level is not what is said


def test_the_same_command_does_nothing_and_another_one_trains_anew(toy, capsys):
    before = (toy / "recogniser" / "model.pth").stat().st_mtime_ns
    assert train_recogniser(toy, "--max_epoch", 12, "--learning_rate", 0.01) == 0
    assert "up to date" in capsys.readouterr().out
    assert (toy / "recogniser" / "model.pth").stat().st_mtime_ns == before
    for output in ("one", "two"):
        assert train_recogniser(toy, "--max_epoch", 1, output=output) == 0
    first, second = (load_recogniser(toy / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert train_recogniser(toy, "--max_epoch", 1, "--seed", 1, output="one") == 0
    other = load_recogniser(toy / "one").state_dict()
    assert not all(torch.equal(other[key], second[key]) for key in other)


@pytest.mark.parametrize("lost", ["text", "spk1.scp"])
def test_without_transcripts_or_clean_speech_it_says_so(lost, tmp_path, capsys):
    mixture_directory(tmp_path / "train", 3, 0)
    mixture_directory(tmp_path / "valid", 3, 1)
    (tmp_path / "train" / lost).unlink()
    assert train_recogniser(tmp_path) == 1
    assert f"{tmp_path / 'train'}: no {lost}" in capsys.readouterr().err
    assert not (tmp_path / "recogniser").exists()


def test_a_file_of_another_rate_is_named(tmp_path, capsys):
    mixture_directory(tmp_path / "train", 3, 0)
    mixture_directory(tmp_path / "valid", 3, 1)
    wrong = tmp_path / "valid" / "001.wav"
    soundfile.write(wrong, np.zeros(8000), 8000)
    assert train_recogniser(tmp_path) == 1
    assert f"{wrong}: want 16000 Hz, as in the training set, not 8000 Hz" in capsys.readouterr().err
    assert not (tmp_path / "recogniser").exists()


def test_spoken_characters_of_english_and_mandarin():
    assert spoken({"u": "It’s  two, Anna!"}) == {"u": "it's two anna"}
    assert spoken({"u": "转向 促商品,房。"}) == {"u": "转向促商品房"}
