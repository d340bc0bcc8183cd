"""Trainings with the rivals without text, alone and beside the transfer, and their exports."""

import numpy as np
import pytest
import torch
import yaml
from conftest import data_options, tiny_config, transfer_conf, write_config
from speech_models import make_encoder, make_recogniser

from cmkt.cli import main


@pytest.fixture(scope="module")
def rivals(tmp_path_factory):
    root = tmp_path_factory.mktemp("rivals")
    confs = {
        "speech_encoder": {"model": str(make_encoder("HuBERT", root / "hubert")), "layer": 2},
        "mimic": {"recogniser": str(make_recogniser(root / "recogniser"))},
    }
    return {
        name: {
            "name": name,
            "conf": conf,
            "wrapper": "fixed_order",
            "wrapper_conf": {"weight": 0.1},
        }
        for name, conf in confs.items()
    }


def config_with(criterions: list[dict], transfer: bool = False) -> dict:
    config = tiny_config(max_epoch=1)
    config["criterions"] = config["criterions"] + criterions
    if transfer:
        config.update(transfer="cmkt", transfer_conf=transfer_conf())
    return config


def train(folder, config, mixtures, stores, statistics) -> int:
    path = write_config(folder.with_suffix(".yaml"), config)
    options = ["--config", str(path), "--output_dir", str(folder), *data_options(mixtures)]
    return main(["train", *options, "--llm_dir", str(stores), "--stats_dir", str(statistics)])


def weights(folder) -> dict:
    return torch.load(folder / "1epoch.pth", weights_only=True)


@pytest.mark.parametrize("transfer", [False, True], ids=["alone", "with the transfer"])
@pytest.mark.parametrize("name", ["speech_encoder", "mimic"])
def test_a_rival_is_trained_with_logged_and_left_behind(
    name, transfer, rivals, tmp_path, mixtures, stores, statistics
):
    from espnet2.bin.enh_inference import SeparateSpeech

    config = config_with([rivals[name]], transfer)
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    state = torch.load(tmp_path / "exp" / "checkpoint.pth", weights_only=False)
    for mode in ("train", "valid"):
        stats = state["reporter"]["stats"][1][mode]
        assert stats[name] > 0
        # Epochs are compared by the enhancement loss alone.
        (l1,) = [value for key, value in stats.items() if key.lower().startswith("l1")]
        assert stats["loss_se"] == pytest.approx(l1, rel=1e-3)
        assert ("loss_cma" in stats) == transfer
        if not transfer:
            assert stats["loss"] == pytest.approx(l1 + 0.1 * stats[name], rel=1e-3)
    base = config_with([], transfer)
    assert train(tmp_path / "base", base, mixtures, stores, statistics) == 0
    ours, theirs = weights(tmp_path / "exp"), weights(tmp_path / "base")
    assert ours.keys() == theirs.keys()
    assert not all(torch.equal(ours[key], theirs[key]) for key in ours)

    assert main(["export", str(tmp_path / "exp")]) == 0
    export = tmp_path / "exp" / "export"
    written = yaml.safe_load((export / "config.yaml").read_text())
    assert [criterion["name"] for criterion in written["criterions"]] == ["l1_fd"]
    stock = SeparateSpeech(export / "config.yaml", export / "model.pth")
    assert sum(p.numel() for p in stock.enh_model.parameters()) == sum(
        tensor.numel() for key, tensor in ours.items() if not key.startswith("transfer.")
    )
    noisy = np.random.default_rng(0).normal(0, 0.1, (1, 8000)).astype(np.float32)
    assert np.isfinite(stock(noisy, fs=16000)[0]).all()


def test_rivals_of_weight_zero_equal_the_baseline(rivals, tmp_path, mixtures, stores, statistics):
    """They draw no random numbers and change nothing but by their gradient; both at once work."""
    silent = [{**rival, "wrapper_conf": {"weight": 0.0}} for rival in rivals.values()]
    for name, criterions in (("exp", silent), ("base", [])):
        config = config_with(criterions)
        config["separator_conf"] = {**config["separator_conf"], "layer": 2, "dropout": 0.5}
        assert train(tmp_path / name, config, mixtures, stores, statistics) == 0
    ours, theirs = weights(tmp_path / "exp"), weights(tmp_path / "base")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_recogniser_makes_another_training(
    rivals, tmp_path, mixtures, stores, statistics, capsys
):
    folder = make_recogniser(tmp_path / "recogniser")
    config = config_with([{**rivals["mimic"], "conf": {"recogniser": str(folder)}}])
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    assert "up to date" in capsys.readouterr().out
    marker = folder / ".done.json"
    marker.write_text(marker.read_text().replace("{}", '{"seed": 1}'))
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    assert len(list(tmp_path.glob("exp.old-*"))) == 1


BAD = {
    "no such folder": ("speech_encoder", {"model": "./nowhere"}, "./nowhere"),
    "no such layer": ("speech_encoder", {"layer": 7}, "speech_encoder.layer: 7"),
    "unknown key": ("speech_encoder", {"layers": 2}, "layers"),
    "no recogniser": ("mimic", {"recogniser": "nowhere"}, "nowhere: no finished recogniser"),
    "wrong distance": ("mimic", {"distance": "cosine"}, "mimic.distance must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line_and_leave_no_checkpoint(
    case, rivals, tmp_path, mixtures, stores, statistics, capsys
):
    name, changes, words = BAD[case]
    rival = {**rivals[name], "conf": {**rivals[name]["conf"], **changes}}
    assert train(tmp_path / "exp", config_with([rival]), mixtures, stores, statistics) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cmkt train: error:") and words in error
    assert not (tmp_path / "exp" / "checkpoint.pth").exists()


def test_rivals_alone_are_refused(rivals, tmp_path, mixtures, stores, statistics, capsys):
    config = tiny_config(criterions=[rivals["mimic"]])
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 1
    assert "accompany an enhancement loss" in capsys.readouterr().err
