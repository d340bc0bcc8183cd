"""Taps below the last layer, the feedback adapter, fast CPU training, and cmkt diagnose."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_config, transfer_conf
from test_plugin import reporter, train, weights

from cmkt.cli import main
from cmkt.enhance.loading import Enhancer
from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import build_enhancement_model, load_training_model
from cmkt.espnet_plugin.model import add_transfer

TWO_LAYERS = {"num_spk": 1, "layer": 2, "unit": 24}


def build(separator="rnn", **conf):
    torch.manual_seed(0)
    config = tiny_config(separator)
    deeper = {"rnn": TWO_LAYERS, "tcn": {**config["separator_conf"], "stack": 2}}
    config["separator_conf"] = deeper[separator]
    conf = transfer_conf(linguistic_dim=6, **conf)
    return add_transfer(build_enhancement_model(config), separator, conf, {}, 16000)


@pytest.mark.parametrize(
    ("separator", "reached", "not_reached"),
    [
        ("rnn", "rnn.nbrnn.weight_hh_l0", ("rnn.nbrnn.weight_hh_l1", "rnn.l_last", "linear")),
        ("tcn", "tcn.network.2.0", ("tcn.network.2.1", "tcn.network.3")),
    ],
)
def test_a_tap_below_the_last_layer_leaves_those_above_to_the_enhancement(
    separator, reached, not_reached
):
    from cmkt.espnet_plugin.listening import listen

    model = build(separator, tap="first")
    speech, lengths = torch.randn(3, 8000), torch.tensor([8000, 6000, 4000])
    with listen(model.separator, model.taps) as heard:
        model.forward_enhance(speech, lengths, {})
    acoustic = heard.sequence(model.taps)
    loss = model.transfer(*acoustic, torch.randn(3, 5, 6), torch.tensor([5, 4, 3]))
    loss.backward()
    names = {n for n, p in model.separator.named_parameters() if p.grad is not None}
    assert any(name.startswith(reached) for name in names)
    assert not any(name.startswith(not_reached) for name in names)


def test_several_taps_are_heard_side_by_side():
    model = build(tap=["first", "last"])
    acoustic, lengths = model.hear(torch.randn(2, 8000), torch.tensor([8000, 4000]))
    assert acoustic.shape[-1] == 2 * TWO_LAYERS["unit"] + TWO_LAYERS["unit"]
    assert lengths.tolist() == [acoustic.shape[1], acoustic.shape[1] - 31]


def test_an_experiment_with_feedback_exports_a_model_that_keeps_the_adapter(
    tmp_path, mixtures, stores, statistics
):
    from espnet2.bin.enh_inference import SeparateSpeech

    conf = transfer_conf(tap="first", feedback={"width": 1})
    config = tiny_config(transfer="cmkt", transfer_conf=conf, separator_conf=TWO_LAYERS)
    exp = tmp_path / "exp"
    assert train(exp, config, mixtures, stores, statistics) == 0
    assert main(["export", str(exp)]) == 0
    exported = torch.load(exp / "export" / "model.pth", weights_only=True)
    assert exported["separator.feedback.up.weight"].abs().sum() > 0
    assert not any(name.startswith("transfer.") for name in exported)
    # The exported model and the one in training enhance alike ...
    noisy = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    enhanced = Enhancer(exp / "export")(noisy)
    trained = load_training_model(exp)
    trained.load_state_dict(
        torch.load(exp / "valid.loss_se.ave.pth", weights_only=True), strict=True
    )
    speech, lengths = torch.from_numpy(noisy)[None], torch.tensor([16000])
    with torch.no_grad():
        expected = trained.forward_enhance(speech, lengths, {})[0][0][0].numpy()
    np.testing.assert_array_equal(enhanced, expected)
    # ... which the adapter has a part in, ...
    torch.nn.init.zeros_(trained.separator.feedback.up.weight)
    with torch.no_grad():
        without = trained.forward_enhance(speech, lengths, {})[0][0][0].numpy()
    assert np.abs(without - expected).max() > 0
    # ... so stock ESPnet must refuse what it would load without it.
    with pytest.raises(ValueError, match="cmkt_rnn"):
        SeparateSpeech(str(exp / "export" / "config.yaml"), str(exp / "export" / "model.pth"))
    assert "stock ESPnet does not know" in (exp / "export" / "README.md").read_text()


def test_feedback_starts_at_the_baseline_and_stays_small():
    speech, lengths = torch.randn(2, 8000), torch.tensor([8000, 6000])
    plain, adapted = build(tap="first"), build(tap="first", feedback={"width": 1})
    with torch.no_grad():
        one, two = (m.forward_enhance(speech, lengths, {})[0][0] for m in (plain, adapted))
    assert torch.equal(one, two)
    with pytest.raises(CmktError, match="at most 3 % are allowed"):
        build(tap="first", feedback={"width": 32})
    with pytest.raises(CmktError, match="feedback: unknown key size"):
        build(tap="first", feedback={"size": 1})
    with pytest.raises(CmktError, match="one tap"):
        build(tap=["first", "last"], feedback={"width": 1})


def test_the_adapter_alone_is_a_control(tmp_path, mixtures, stores, statistics):
    """alpha = 1 with feedback: the parameters of the adapter, nothing of the text."""
    conf = transfer_conf(tap="first", alpha=1, feedback={"width": 1})
    config = tiny_config(
        max_epoch=1, transfer="cmkt", transfer_conf=conf, separator_conf=TWO_LAYERS
    )
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    names = weights(tmp_path / "exp", 1)
    assert "separator.feedback.up.weight" in names
    assert not any(name.startswith("transfer.") for name in names)


def test_fast_cpu_training_equals_the_stock_one_to_rounding(tmp_path, mixtures, stores, statistics):
    config = tiny_config(max_epoch=1, separator_conf=TWO_LAYERS)
    for name, fast in (("stock", False), ("fast", True)):
        config["fast_cpu"] = fast
        assert train(tmp_path / name, config, mixtures, stores, statistics) == 0
    stock, fast = weights(tmp_path / "stock", 1), weights(tmp_path / "fast", 1)
    assert stock.keys() == fast.keys()
    assert max((stock[k] - fast[k]).abs().max().item() for k in stock) < 1e-4
    assert torch.tensor(1e-40) * 1 != 0, "denormal numbers are left as they were"


def test_diagnose_computes_what_training_logged(tmp_path, mixtures, stores, statistics, capsys):
    conf = transfer_conf(alpha=0.5, loss={"cosine": 1.0, "contrastive": 0.1})
    config = tiny_config(transfer="cmkt", transfer_conf=conf, valid_batch_size=4)
    exp = tmp_path / "exp"
    assert train(exp, config, mixtures, stores, statistics) == 0
    best = torch.load(exp / "valid.loss_se.best.pth", weights_only=True)
    epoch = next(
        n for n in (1, 2) if all(torch.equal(best[k], v) for k, v in weights(exp, n).items())
    )
    logged = reporter(exp)[epoch]["valid"]
    command = ["diagnose", str(exp), "valid", "--dumpdir", str(mixtures), "--batch_size", "4"]
    assert main(command) == 0
    values = json.loads((exp / "diagnostics" / "valid.json").read_text())
    assert values["utterances"] == 3  # one of the four has no transcript
    for name in ("retrieval_top1", "retrieval_top5_mismatched", "alignment_entropy",
                 "alignment_monotonicity", "gradient_share", "loss_contrastive"):  # fmt: skip
        assert name in values and name in logged
    # The batch of training had a fourth utterance, which takes no part in these.
    for name in ("cos_matched", "cos_mismatched", "retrieval_top1", "loss_cma"):
        assert values[name] == pytest.approx(float(logged[name]), abs=1e-4), name
    assert f"written to {exp}/diagnostics/valid.json" in capsys.readouterr().out
    assert main([*command, "--llm_dir", str(tmp_path / "none")]) == 1
    assert f"{tmp_path}/none" in capsys.readouterr().err
    (exp / "config.yaml").write_text("transfer: none\n")
    assert main(command) == 1
    assert "trained without transfer" in capsys.readouterr().err


def test_nan_in_a_store_names_the_utterance(tmp_path, mixtures, stores, statistics):
    import kaldiio

    from cmkt.espnet_plugin.data import OptionalArk

    matrix = np.full((2, 6), np.nan, np.float32)
    kaldiio.save_ark(str(tmp_path / "a.ark"), {"spoilt": matrix}, scp=str(tmp_path / "a.scp"))
    with pytest.raises(CmktError, match="of utterance spoilt"):
        OptionalArk(str(tmp_path / "a.scp"))["spoilt"]
