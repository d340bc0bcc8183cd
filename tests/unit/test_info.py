"""cmkt info: operations and parameters equal those counted by hand; one-line errors."""

import json

import pytest
import torch
import yaml
from conftest import REPOSITORY, tiny_config, transfer_conf
from torch import nn

from cmkt.cli import main
from cmkt.espnet_plugin.build import build_enhancement_model
from cmkt.espnet_plugin.info import count_macs
from cmkt.espnet_plugin.model import add_transfer
from cmkt.transfer import CrossModalTransfer

BLSTM = REPOSITORY / "egs" / "mini" / "conf" / "train_blstm.yaml"
TCN = REPOSITORY / "conf" / "train_tcn.yaml"
SECONDS = 4  # what the MACs are a mean over


def info(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main(["info", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def write(path, **changes):
    path.write_text(yaml.safe_dump({**tiny_config(), "sample_rate": 16000, **changes}))
    return path


def lstm_macs(width, hidden):
    """Return the MACs of a step of both directions."""
    return 2 * 4 * (width + hidden) * hidden


def test_blstm_equals_the_count_by_hand(capsys):
    values = info(capsys, BLSTM)
    bins, hidden, frames = 512 // 2 + 1, 96, SECONDS * 16000 // 320 + 1
    recurrent = lstm_macs(bins, hidden) + lstm_macs(2 * hidden, hidden)
    step = recurrent + 2 * hidden * hidden + hidden * bins
    assert values["macs_per_second"] == frames * step / SECONDS
    biases = 2 * 2 * 2 * 4 * hidden + hidden + bins  # torch has two for each gate
    assert values["parameters"] == step + biases
    assert values["transfer_parameters"] == 0
    assert values["taps"] == []
    assert values["feedback"] is None


def test_tcn_equals_the_count_by_hand(capsys):
    values = info(capsys, TCN)
    bins, bottleneck, hidden, kernel = 512 // 2 + 1, 128, 512, 3
    frames = SECONDS * 16000 // 128 + 1
    block = bottleneck * hidden + kernel * hidden + hidden * bottleneck
    step = bins * bottleneck + 3 * 8 * block + bottleneck * bins
    assert values["macs_per_second"] == frames * step / SECONDS


def test_feedback_equals_the_count_by_hand_and_is_compared_with_the_backbone(capsys, tmp_path):
    config = yaml.safe_load(BLSTM.read_text())
    conf = {"tap": "first", "feedback": {"width": 24}}
    path = tmp_path / "feedback.yaml"
    path.write_text(yaml.safe_dump({**config, "transfer": "cmkt", "transfer_conf": conf}))
    plain, values = info(capsys, BLSTM), info(capsys, path)
    width, frames = 2 * 96, SECONDS * 16000 // 320 + 1
    tap = {"module": "rnn.nbrnn.after.0", "side": "output", "layout": "BTD"}
    assert values["taps"] == [{**tap, "width": width, "frames_per_second": 50.0}]
    feedback = values["feedback"]
    assert feedback["macs_per_second"] == frames * 2 * width * 24 / SECONDS
    assert feedback["parameters"] == 2 * width + (width * 24 + 24) + (24 * width + width)
    for name in ("parameters", "macs_per_second"):
        assert values[name] == plain[name] + feedback[name]
    share = 100 * feedback["macs_per_second"] / plain["macs_per_second"]
    assert feedback["share_of_macs"] == pytest.approx(share)
    # The STFT has no parameters, so the separator has them all.
    share = 100 * feedback["parameters"] / plain["parameters"]
    assert feedback["share_of_parameters"] == pytest.approx(share)
    assert values["transfer_parameters"] is None
    assert main(["info", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"{feedback['parameters']:,} parameters (1.82 % of the separator)" in printed
    assert "depends on --linguistic_dim" in printed


def test_the_transfer_is_counted_apart_once_its_width_is_known(capsys, tmp_path):
    conf = {"alignment": {"width": 16, "heads": 2}}
    path = write(tmp_path / "a.yaml", transfer="cmkt", transfer_conf=conf)
    values = info(capsys, path, "--linguistic_dim", 6)
    (tap,) = values["taps"]
    transfer = CrossModalTransfer(tap["width"], 6, **conf)
    expected = sum(parameter.numel() for parameter in transfer.parameters())
    assert values["transfer_parameters"] == expected
    unknown = info(capsys, path)
    assert unknown.pop("transfer_parameters") is None
    assert all(values[key] == value for key, value in unknown.items())
    assert info(capsys, write(tmp_path / "b.yaml"))["parameters"] == values["parameters"]


@pytest.mark.parametrize("feedback", [None, {"width": 1}])
def test_a_training_and_its_export_tell_the_same(capsys, tmp_path, feedback):
    changes = {"separator_conf": {"num_spk": 1, "layer": 2, "unit": 24}, "transfer": "cmkt"}
    conf = transfer_conf(tap="first", linguistic_dim=6, feedback=feedback)
    write(tmp_path / "config.yaml", **changes, transfer_conf=conf)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    model = add_transfer(build_enhancement_model(config), "rnn", conf, {}, 16000)
    torch.save(model.state_dict(), tmp_path / "valid.loss_se.best.pth")
    assert main(["export", str(tmp_path)]) == 0
    training, export = info(capsys, tmp_path), info(capsys, tmp_path / "export")
    assert training.pop("model") != export.pop("model")
    assert training == export
    assert training["transfer_parameters"] > 0
    weights = torch.load(tmp_path / "export" / "model.pth", weights_only=True)
    assert training["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert (training["feedback"] is None) == (feedback is None)


@pytest.mark.parametrize("need_weights", [True, False])
def test_fused_operations_count_like_the_plain_ones(need_weights):
    frames, width, hidden = 50, 16, 8
    x = torch.randn(1, frames, width)
    lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True).eval()
    assert count_macs(lambda: lstm(x))["Global"] == frames * lstm_macs(width, hidden)
    attention = nn.MultiheadAttention(width, 4, batch_first=True).eval()
    with torch.no_grad():
        macs = count_macs(lambda: attention(x, x, x, need_weights=need_weights))["Global"]
    assert macs == 4 * frames * width * width + 2 * frames * frames * width


def test_errors_take_one_line(capsys, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("model: minilm\n")
    broken = write(tmp_path / "broken.yaml", transfer="cmkt", transfer_conf={"tap": "lst"})
    for path, expected in (
        (tmp_path / "missing.yaml", "missing.yaml: no such model"),
        (tmp_path, "config.yaml: no such model"),
        (other, "other.yaml: not a training configuration: no encoder"),
        (broken, "separator rnn has no tap or module 'lst'"),
        (write(tmp_path / "rnm.yaml", separator="rnm"), "separator: no such choice: 'rnm'"),
    ):
        assert main(["info", str(path)]) == 1
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1


# Parameters that the papers state: GTCRN (ICASSP 2024), MP-SENet (2305.13686), DCCRN (2008.00264),
# Dual-path RNN (1910.06379) and DPTNet (2007.13975).
PUBLISHED = {"gtcrn": 23.67e3, "mp_senet": 2.05e6, "dccrn": 3.7e6, "dprnn": 2.6e6, "dptnet": 2.69e6}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_published_sizes_have_the_published_parameters(backbone):
    path = REPOSITORY / "conf" / f"train_{backbone}.yaml"
    model = build_enhancement_model(yaml.safe_load(path.read_text()))
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == pytest.approx(PUBLISHED[backbone], rel=0.05)


def test_a_size_of_a_yaml(capsys):
    full, tiny = info(capsys, TCN), info(capsys, TCN, "--size", "tiny")
    assert tiny["parameters"] < full["parameters"] / 10
    assert main(["info", str(TCN), "--size", "huge"]) == 1
    assert "known: tiny" in capsys.readouterr().err


CAUSAL = {"num_spk": 1, "layer": 2, "stack": 1, "bottleneck_dim": 8, "hidden_dim": 8,
          "causal": True, "norm_type": "cLN"}  # fmt: skip


def test_receptive_field_equals_the_count_by_hand(capsys, tmp_path):
    path = write(tmp_path / "tcn.yaml", separator="tcn", separator_conf=CAUSAL)
    values = info(capsys, path)
    # Kernels of 3 with dilations 1 and 2 reach 6 frames back, and a sample lies in two windows of
    # 128 samples, whose first is zeroed.
    assert values["receptive_field"] == {"past": 7 * 64 / 16000, "future": 127 / 16000}
    assert values["latency"] == 8  # ms of a window
    assert values["normalises"] is False


def test_a_model_that_needs_the_whole_signal_has_no_latency_in_ms(capsys, tmp_path):
    assert info(capsys, BLSTM)["latency"] is None
    level = {"model_conf": {"normalize_variance": True}}
    path = write(tmp_path / "tcn.yaml", separator="tcn", separator_conf=CAUSAL, **level)
    assert main(["info", str(path)]) == 0
    assert "8 ms, after the level of the whole signal" in capsys.readouterr().out
