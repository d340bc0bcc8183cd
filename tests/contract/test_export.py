"""What an export promises to stock ESPnet, and what stages 6 and 7 must not need."""

import argparse
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml

from cmkt.cli import main
from cmkt.enhance.loading import Enhancer
from cmkt.espnet_plugin.build import (
    OWN_CRITERIONS,
    OWN_SEPARATORS,
    SEPARATORS,
    build_enhancement_model,
)

STFT = {"n_fft": 128, "hop_length": 64}
RNN = {"separator": "rnn", "separator_conf": {"num_spk": 1, "layer": 1, "unit": 8}}
TCN = {
    "separator": "tcn",
    "separator_conf": {"num_spk": 1, "layer": 2, "stack": 1, "bottleneck_dim": 8, "hidden_dim": 8},
}
CONV = {
    "encoder": "conv",
    "encoder_conf": {"channel": 8, "kernel_size": 20, "stride": 10},
    "decoder": "conv",
    "decoder_conf": {"channel": 8, "kernel_size": 20, "stride": 10},
}
BSRNN = {
    "separator": "bsrnn",
    "separator_conf": {"num_spk": 1, "num_channels": 4, "num_layers": 1},
    "encoder_conf": {"n_fft": 960, "hop_length": 480, "default_fs": 48000},
    "decoder_conf": {"n_fft": 960, "hop_length": 480, "default_fs": 48000},
}


def make_config(**changes):
    return {
        "encoder": "stft",
        "encoder_conf": STFT,
        "decoder": "stft",
        "decoder_conf": STFT,
        "mask_module": "multi_mask",
        "mask_module_conf": {},
        "criterions": [{"name": "l1_fd", "wrapper": "fixed_order", "wrapper_conf": {}}],
        "model_conf": {"normalize_variance": True},
        "num_spk": 1,
        "sample_rate": 16000,
        "init": "xavier_uniform",
        **changes,
    }


def make_experiment(folder, config):
    folder.mkdir()
    torch.manual_seed(0)
    weights = build_enhancement_model(config).state_dict()
    torch.save({**weights, "transfer.x": torch.ones(2)}, folder / "valid.loss_se.best.pth")
    config = {**config, "transfer": "cmkt", "transfer_conf": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return weights


def speech(seconds=1.0):
    samples = 0.1 * np.random.default_rng(0).standard_normal(int(16000 * seconds))
    return samples.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        RNN,
        TCN,
        {**TCN, **CONV},
        BSRNN,
        {**RNN, "model_conf": {}},
        {**RNN, "model_conf": {"normalize_variance_per_ch": True}},
        {**RNN, "model_conf": {"normalize_variance": True, "always_forward_in_48k": True}},
    ],
    ids=["rnn", "tcn", "conv-tasnet", "bsrnn", "plain", "per_ch", "48k"],
)
def test_stock_espnet_loads_it_and_gives_the_same_samples(tmp_path, changes):
    from espnet2.bin.enh_inference import SeparateSpeech

    config = make_config(**changes)
    weights = make_experiment(tmp_path / "exp", config)
    assert main(["export", str(tmp_path / "exp")]) == 0
    folder = tmp_path / "exp" / "export"
    stock = SeparateSpeech(folder / "config.yaml", folder / "model.pth")
    # SeparateSpeech loads non-strictly, so see that nothing was left at its initial value.
    loaded = stock.enh_model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    for noisy in (speech(), speech(0.5)[:4001]):
        expected = stock(noisy[None], fs=16000)[0][0]
        assert np.array_equal(Enhancer(folder)(noisy), expected)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [RNN, TCN, BSRNN], ids=["rnn", "tcn", "bsrnn"])
def test_model_is_the_one_that_espnets_task_builds(changes):
    from espnet2.tasks.enh import EnhancementTask

    config = make_config(**changes, init=None)
    torch.manual_seed(0)
    ours = build_enhancement_model(config)
    torch.manual_seed(0)
    theirs = EnhancementTask.build_model(argparse.Namespace(**config))
    assert {n: type(m) for n, m in ours.named_modules()} == {
        n: type(m) for n, m in theirs.named_modules()
    }
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_every_separator_of_espnet_is_known():
    from espnet2.tasks.enh import decoder_choices, encoder_choices, separator_choices

    from cmkt.espnet_plugin.build import DECODERS, ENCODERS, find_class

    for table, choices in (
        (ENCODERS, encoder_choices),
        (DECODERS, decoder_choices),
        (SEPARATORS, separator_choices),
    ):
        ours = {"tcn_nomask", *OWN_SEPARATORS}  # our task adds its own to ESPnet's
        theirs = {k: v for k, v in choices.classes.items() if k not in ours}
        assert {name: find_class("part", name, table) for name in table} == theirs


def test_stages_6_and_7_need_neither_transformers_nor_the_task_nor_our_text_side(tmp_path):
    make_experiment(tmp_path / "exp", make_config(**RNN))
    soundfile.write(tmp_path / "a.wav", speech(), 16000)
    code = """
import sys
blocked = ("transformers", "cmkt.linguistic", "cmkt.transfer", "espnet2.tasks.enh")
sys.modules.update(dict.fromkeys(blocked))
from cmkt.cli import main
exp, wav, out = sys.argv[1:]
sys.exit(main(["export", exp]) or main(["enhance", exp + "/export", wav, "-o", out]))
"""
    words = [str(tmp_path / name) for name in ("exp", "a.wav", "out")]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert soundfile.info(tmp_path / "out" / "a.wav").frames == 16000


def test_exported_weights_are_plain_tensors(tmp_path):
    make_experiment(tmp_path / "exp", make_config(**RNN))
    assert main(["export", str(tmp_path / "exp")]) == 0
    weights = torch.load(tmp_path / "exp" / "export" / "model.pth", weights_only=True)
    assert type(weights) is dict
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())


STOCK = """
import sys
from espnet2.bin.enh_inference import SeparateSpeech
SeparateSpeech(sys.argv[1] + "/config.yaml", sys.argv[1] + "/model.pth")
"""


def load_with_stock_espnet(folder) -> subprocess.CompletedProcess:
    """Load an export in a process that knows nothing of this project."""
    command = [sys.executable, "-c", STOCK, str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_an_export_with_a_separator_of_ours_says_that_it_needs_cmkt(tmp_path):
    blstm_sum = {"separator": "blstm_sum", "separator_conf": {"unit": 8}}
    make_experiment(tmp_path / "exp", make_config(**blstm_sum))
    assert main(["export", str(tmp_path / "exp")]) == 0
    folder = tmp_path / "exp" / "export"
    assert "it needs `cmkt`" in (folder / "README.md").read_text()
    assert np.isfinite(Enhancer(folder)(speech())).all()
    refused = load_with_stock_espnet(folder)
    assert refused.returncode != 0 and "blstm_sum" in refused.stderr


@pytest.mark.slow
def test_losses_of_ours_do_not_keep_stock_espnet_from_loading(tmp_path):
    from cmkt.espnet_plugin.spectral_criterions import SPECTRAL_CRITERIONS

    assert list(SPECTRAL_CRITERIONS) == list(OWN_CRITERIONS)
    loss = {"name": "compressed_magnitude", "wrapper": "fixed_order", "wrapper_conf": {}}
    make_experiment(tmp_path / "exp", make_config(**RNN, criterions=[loss]))
    assert main(["export", str(tmp_path / "exp")]) == 0
    loaded = load_with_stock_espnet(tmp_path / "exp" / "export")
    assert loaded.returncode == 0, loaded.stderr
