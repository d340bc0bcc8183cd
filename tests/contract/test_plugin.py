"""The ESPnet plugin: equality with stock, gradients, missing text, resume, bad settings."""

import shutil

import numpy as np
import pytest
import torch
from conftest import data_options, tiny_config, transfer_conf, write_config

from cmkt.cli import main


def train(folder, config, mixtures, stores, statistics, *more) -> int:
    path = write_config(folder.with_suffix(".yaml"), config)
    options = ["--config", str(path), "--output_dir", str(folder), *data_options(mixtures)]
    options += ["--llm_dir", str(stores), "--stats_dir", str(statistics), *more]
    return main(["train", *options])


def weights(folder, epoch=2) -> dict:
    return torch.load(folder / f"{epoch}epoch.pth", weights_only=True)


def reporter(folder) -> dict:
    return torch.load(folder / "checkpoint.pth", weights_only=False)["reporter"]["stats"]


def test_alpha_one_equals_stock_enh_train(tmp_path, mixtures, stores, statistics):
    """With alpha = 1 the text cannot matter, so the weights are stock ESPnet's to the last bit."""
    from espnet2.tasks.enh import EnhancementTask

    config = tiny_config(max_epoch=1, transfer="cmkt", transfer_conf=transfer_conf(alpha=1))
    assert train(tmp_path / "ours", config, mixtures, stores, statistics) == 0
    stock = tiny_config(max_epoch=1, best_model_criterion=[["valid", "loss", "min"]])
    path = write_config(tmp_path / "stock.yaml", stock)
    command = ["--config", str(path), "--output_dir", str(tmp_path / "stock")]
    for mode in ("train", "valid"):
        audio = mixtures / "audio" / mode
        for name, key in (("wav.scp", "speech_mix"), ("spk1.scp", "speech_ref1")):
            command += [f"--{mode}_data_path_and_name_and_type", f"{audio / name},{key},sound"]
        command += [f"--{mode}_shape_file", str(statistics / mode / "speech_mix_shape")]
    EnhancementTask.main(cmd=command)
    ours, theirs = weights(tmp_path / "ours", 1), weights(tmp_path / "stock", 1)
    assert ours.keys() == theirs.keys()
    assert max((ours[k] - theirs[k]).abs().max().item() for k in theirs) == 0.0


@pytest.mark.parametrize("separator", ["rnn", "tcn"])
def test_training_logs_the_gap_and_selects_on_the_enhancement_loss(
    separator, tmp_path, mixtures, stores, statistics
):
    config = tiny_config(separator, transfer="cmkt", transfer_conf=transfer_conf())
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    valid = reporter(tmp_path / "exp")[2]["valid"]
    for key in ("loss_se", "loss_cma", "cos_matched", "cos_mismatched", "transfer_gap"):
        assert key in valid
    assert (tmp_path / "exp" / "valid.loss_se.best.pth").exists()
    assert (tmp_path / "exp" / ".done.json").exists()


def test_initial_enhancement_weights_do_not_depend_on_the_transfer(stores):
    """A baseline and its CMKT twin of one seed start from the same enhancement model."""
    from cmkt.espnet_plugin.task import TransferEnhancementTask

    def build(**changes):
        torch.manual_seed(0)
        parser = TransferEnhancementTask.get_parser()
        args = parser.parse_args(["--output_dir", "unused"])
        for key, value in {**tiny_config(), **changes}.items():
            setattr(args, key, value)
        return TransferEnhancementTask.build_model(args)

    base = build().state_dict()
    twin = build(transfer="cmkt", transfer_conf=transfer_conf(linguistic_dim=6)).state_dict()
    assert all(torch.equal(base[key], twin[key]) for key in base)
    assert all(key in base or key.startswith("transfer.") for key in twin)
    assert len(twin) > len(base)


@pytest.mark.parametrize("separator", ["rnn", "tcn"])
def test_alignment_gradient_reaches_below_the_tap_and_no_text_is_needed_per_utterance(separator):
    from espnet2.enh.encoder.stft_encoder import STFTEncoder

    from cmkt.espnet_plugin.build import build_enhancement_model
    from cmkt.espnet_plugin.listening import listen
    from cmkt.espnet_plugin.model import add_transfer

    torch.manual_seed(0)
    config = tiny_config(separator)
    conf = transfer_conf(linguistic_dim=6)
    model = add_transfer(build_enhancement_model(config), separator, conf, {}, 16000)
    assert isinstance(model.encoder, STFTEncoder)
    speech, lengths = torch.randn(3, 8000), torch.tensor([8000, 6000, 4000])
    with listen(model.separator, model.taps) as heard:
        model.forward_enhance(speech, lengths, {})
    text = torch.randn(3, 5, 6)
    text[1] = 0  # no transcript
    acoustic = heard.sequence(model.taps)
    loss = model.transfer(*acoustic, text, torch.tensor([5, 1, 3]))
    loss.backward()
    reached = {n for n, p in model.separator.named_parameters() if p.grad is not None}
    head = {"rnn": "linear", "tcn": "tcn.network.3"}[separator]
    below = {n for n, _ in model.separator.named_parameters() if not n.startswith(head)}
    assert any(n in below for n in reached)
    assert not any(n.startswith(head) for n in reached)
    # A whole batch without text still gives every transfer parameter a (zero) gradient: DDP.
    model.zero_grad()
    with listen(model.separator, model.taps) as heard:
        model.forward_enhance(speech, lengths, {})
    acoustic = heard.sequence(model.taps)
    loss = model.transfer(*acoustic, torch.zeros(3, 1, 6), torch.ones(3).long())
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None for p in model.transfer.parameters())
    assert not model.separator._forward_pre_hooks


def test_killed_after_an_epoch_and_resumed_equals_uninterrupted(
    tmp_path, mixtures, stores, statistics
):
    config = tiny_config(transfer="cmkt", transfer_conf=transfer_conf(), max_epoch=2)
    assert train(tmp_path / "whole", config, mixtures, stores, statistics) == 0
    config["max_epoch"] = 1
    assert train(tmp_path / "killed", config, mixtures, stores, statistics) == 0
    # What a kill between the checkpoint and the rest of an epoch leaves behind.
    (tmp_path / "killed" / ".done.json").unlink()
    (tmp_path / "killed" / "1epoch.pth").write_bytes(b"half")
    config["max_epoch"] = 2
    assert train(tmp_path / "killed", config, mixtures, stores, statistics) == 0
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_second_run_does_nothing_and_a_changed_option_keeps_the_old_experiment(
    tmp_path, mixtures, stores, statistics, capsys
):
    config = tiny_config(max_epoch=1)
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    before = (tmp_path / "exp" / "1epoch.pth").stat().st_mtime_ns
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    assert (tmp_path / "exp" / "1epoch.pth").stat().st_mtime_ns == before
    config["optim_conf"] = {"lr": 0.02}
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    assert (tmp_path / "exp" / "1epoch.pth").stat().st_mtime_ns != before
    assert len(list(tmp_path.glob("exp.old-*"))) == 1


BAD = {
    "unknown key": ({"max_epochs": 3}, "did you mean max_epoch?"),
    "wrong type": ({"max_epoch": "three"}, "max_epoch"),
    "unknown part key": ({"separator_conf": {"num_spk": 1, "units": 8}}, "units"),
    "alpha too large": ({"transfer_conf": transfer_conf(alpha=1.5)}, "alpha"),
    "unknown transfer key": ({"transfer_conf": transfer_conf(beta=1)}, "beta"),
    "wrong transfer type": ({"transfer_conf": transfer_conf(alignment={"heads": "four"})}, "heads"),
    "unknown tap": ({"transfer_conf": transfer_conf(tap="middle")}, "middle"),
    "chunks": ({"iterator_type": "chunk"}, "chunk"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line_and_leave_no_checkpoint(
    case, tmp_path, mixtures, stores, statistics, capsys
):
    changes, words = BAD[case]
    config = tiny_config(**{"transfer": "cmkt", "transfer_conf": transfer_conf(), **changes})
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cmkt train: error:") and words in error
    assert not (tmp_path / "exp" / "checkpoint.pth").exists()


def test_a_store_of_another_model_is_refused(tmp_path, mixtures, stores, statistics, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(stores, mixed)
    meta = mixed / "valid" / "meta.yaml"
    meta.write_text(meta.read_text().replace("toy", "another"))
    config = tiny_config(transfer="cmkt", transfer_conf=transfer_conf())
    assert train(tmp_path / "exp", config, mixtures, mixed, statistics) == 1
    assert "another" in capsys.readouterr().err


def test_missing_transcripts_are_zeros(stores):
    from cmkt.espnet_plugin.data import OptionalArk

    ark = OptionalArk(str(stores / "train" / "linguistic.scp"))
    assert ark["train7"].shape == (1, 6) and not np.any(ark["train7"])
    assert np.any(ark["train0"])


def test_standardised_targets_come_from_the_training_set(
    tmp_path, mixtures, stores, statistics, capsys
):
    from cmkt.espnet_plugin.build import load_training_model

    conf = transfer_conf(standardise=True, pca=4)
    config = tiny_config(transfer="cmkt", transfer_conf=conf, max_epoch=1)
    assert train(tmp_path / "exp", config, mixtures, stores, statistics) == 0
    # The experiment keeps them: the store is not needed to look into a trained model.
    targets = load_training_model(tmp_path / "exp").transfer.targets
    with np.load(stores / "train" / "statistics.npz") as found:
        np.testing.assert_allclose(targets.mean, found["mean"])
        np.testing.assert_allclose(targets.scale**-2, found["covariance"].diagonal(), rtol=1e-4)
    without = ["--linguistic_statistics", "nowhere.npz"]
    for mode in ("train", "valid"):
        scp = stores / mode / "linguistic.scp"
        without += [f"--{mode}_data_path_and_name_and_type", f"{scp},linguistic,linguistic_ark"]
    path = write_config(tmp_path / "c.yaml", tiny_config(
        transfer="cmkt", transfer_conf={**conf, "linguistic_dim": 6}))  # fmt: skip
    command = ["train", "--config", str(path), "--output_dir", str(tmp_path / "other"),
               *data_options(mixtures), "--stats_dir", str(statistics)]  # fmt: skip
    assert main([*command, *without]) == 1
    assert "nowhere.npz: no statistics" in capsys.readouterr().err
    assert main([*command, *without[2:]]) == 1
    assert "--linguistic_statistics" in capsys.readouterr().err


def test_transfer_none_on_the_command_line_equals_the_baseline(
    tmp_path, mixtures, stores, statistics
):
    """What `run.sh --text_source none` does with a CMKT configuration."""
    config = tiny_config(max_epoch=1, transfer="cmkt", transfer_conf=transfer_conf())
    missing = tmp_path / "no_store"
    assert (
        train(tmp_path / "none", config, mixtures, missing, statistics, "--transfer", "none") == 0
    )
    base = tiny_config(max_epoch=1)
    assert train(tmp_path / "base", base, mixtures, missing, statistics) == 0
    none, base = weights(tmp_path / "none", 1), weights(tmp_path / "base", 1)
    assert none.keys() == base.keys()
    assert all(torch.equal(none[key], base[key]) for key in base)


def test_corrupt_store_stops_before_training(tmp_path, mixtures, stores, statistics, capsys):
    broken = shutil.copytree(stores, tmp_path / "broken")
    ark = broken / "train" / "linguistic.1.ark"
    ark.write_bytes(ark.read_bytes()[:-8])
    config = tiny_config(transfer="cmkt", transfer_conf=transfer_conf())
    assert train(tmp_path / "exp", config, mixtures, broken, statistics) == 1
    assert f"{ark}: corrupt store" in capsys.readouterr().err
    assert not (tmp_path / "exp" / "checkpoint.pth").exists()
