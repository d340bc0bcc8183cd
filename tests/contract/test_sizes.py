"""`--size`: every training YAML at its tiny size, and what a size file may not say."""

import pytest
import torch
import yaml
from conftest import REPOSITORY, data_options, tiny_config, transfer_conf, write_config

from cmkt.cli import main
from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import build_enhancement_model
from cmkt.espnet_plugin.sizes import PARTS, apply_size

CONFIGS = sorted(
    path for path in REPOSITORY.glob("conf/train_*.yaml") if not path.stem.endswith("_cmkt")
)
TWINS = sorted(REPOSITORY.glob("conf/train_*_cmkt.yaml"))
FEW = 300_000


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_tiny_is_smaller_and_steps(path):
    """The parameters are few, and each of them is trained."""
    config = yaml.safe_load(path.read_text())
    sized = apply_size(config, path, "tiny")
    assert config == yaml.safe_load(path.read_text())
    model = build_enhancement_model(sized).train()
    assert count(model) < min(FEW, count(build_enhancement_model(config)))
    speech, lengths = torch.randn(2, 8000), torch.tensor([8000, 7000])
    enhanced, *_ = model.forward_enhance(speech, lengths, {})
    while isinstance(enhanced, list):  # SVoice: of each block, of each speaker
        enhanced = enhanced[-1]
    assert enhanced.shape == speech.shape
    (enhanced - speech).abs().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("path", TWINS, ids=lambda p: p.stem)
def test_a_twin_has_the_size_of_its_baseline(path):
    twin = yaml.safe_load(path.read_text())
    base = path.with_stem(path.stem.removesuffix("_cmkt"))
    base = apply_size(yaml.safe_load(base.read_text()), base, "tiny")
    sized = apply_size(twin, path, "tiny")
    assert [sized[part] for part in PARTS if part in sized] == [
        base[part] for part in PARTS if part in base
    ]
    assert sized["transfer_conf"] == twin["transfer_conf"]
    assert "max_epoch" in sized and sized["max_epoch"] < twin["max_epoch"]


def write_size(folder, content) -> None:
    (folder / "size").mkdir()
    (folder / "size" / "small.yaml").write_text(content)


def test_an_unknown_size_lists_the_known_ones():
    path = REPOSITORY / "conf" / "train_tcn.yaml"
    with pytest.raises(CmktError, match=r"no such size: huge \(known: .*tiny"):
        apply_size(yaml.safe_load(path.read_text()), path, "huge")


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("all:\n  criterions: []\nrnn: {}\n", 2, "all.criterions cannot be changed"),
        ("rnn:\n  optim_conf: {lr: 1}\n", 2, "rnn.optim_conf cannot be changed"),
        ("all: {}\nrn: {}\n", 2, "no such separator: rn"),
        (
            "rnn:\n  separator_conf:\n    layer: 1\n    units: 4\n",
            4,
            "rnn.separator_conf.units: sep",
        ),
        ("rnn: 4\n", 1, "rnn must be a mapping"),
        ("rnn:\n\n  separator_conf: 4\n", 3, "rnn.separator_conf must be a mapping"),
    ],
)
def test_a_wrong_size_file_is_an_error_at_its_line(content, line, words, tmp_path, capsys):
    path = write_config(tmp_path / "train_x.yaml", tiny_config())
    write_size(tmp_path, content)
    options = ["--config", str(path), "--size", "small", "--output_dir", str(tmp_path / "exp")]
    assert main(["train", *options]) == 1
    error = capsys.readouterr().err
    assert f"small.yaml:{line}: {words}" in error and error.count("\n") == 1


def test_a_separator_without_a_section_has_no_such_size(tmp_path):
    write_size(tmp_path, "all: {max_epoch: 1}\nrnn: {}\n")
    with pytest.raises(CmktError, match="small.yaml: no size for separator tcn"):
        apply_size(tiny_config("tcn"), tmp_path / "train_x.yaml", "small")


def test_a_size_needs_a_configuration(tmp_path, capsys):
    assert main(["train", "--size", "tiny", "--output_dir", str(tmp_path / "exp")]) == 1
    assert "--size needs --config" in capsys.readouterr().err


def test_keys_are_merged_and_the_rest_stays(tmp_path):
    """A key that the YAML leaves at its default can be changed too."""
    size = "all: {optim_conf: {eps: 1.0e-6}}\nrnn: {separator_conf: {unit: 4, rnn_type: gru}}\n"
    write_size(tmp_path, size)
    config = tiny_config()
    sized = apply_size(config, tmp_path / "train_x.yaml", "small")
    assert sized.pop("optim_conf") == {**config.pop("optim_conf"), "eps": 1e-6}
    assert sized.pop("separator_conf") == {
        **config.pop("separator_conf"),
        "unit": 4,
        "rnn_type": "gru",
    }
    assert sized == config


def test_a_full_configuration_trains_tiny(tmp_path, mixtures, stores, statistics):
    """With an encoder that is learnt, a loss in dB and the transfer."""
    config, output = REPOSITORY / "conf" / "train_skim_cmkt.yaml", tmp_path / "exp"
    options = ["--config", str(config), "--size", "tiny", "--max_epoch", "2", "--num_workers", "0"]
    options += [*data_options(mixtures), "--llm_dir", str(stores), "--stats_dir", str(statistics)]
    assert main(["train", *options, "--output_dir", str(output)]) == 0
    trained = yaml.safe_load((output / "config.yaml").read_text())
    assert trained["fast_cpu"] and trained["separator_conf"]["unit"] == 48
    state = torch.load(output / "checkpoint.pth", weights_only=False)
    first, last = (state["reporter"]["stats"][epoch]["train"] for epoch in (1, 2))
    assert last["loss_se"] < first["loss_se"] and last["loss_cma"] > 0


def test_training_at_a_size(tmp_path, mixtures, stores, statistics, capsys):
    """It trains the small model; another size is another training; options still count more."""
    changes = {"transfer": "cmkt", "transfer_conf": transfer_conf(), "max_epoch": 3}
    path = write_config(tmp_path / "train_x.yaml", tiny_config(**changes))
    write_size(tmp_path, "all:\n  max_epoch: 2\nrnn:\n  separator_conf:\n    unit: 4\n")
    options = ["--config", str(path), "--output_dir", str(tmp_path / "exp")]
    options += [*data_options(mixtures), "--llm_dir", str(stores), "--stats_dir", str(statistics)]
    small = [*options, "--size", "small", "--max_epoch", "1"]
    assert main(["train", *small]) == 0
    trained = yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())
    assert trained["separator_conf"]["unit"] == 4 and trained["max_epoch"] == 1
    assert trained["config"] == str(path)
    weights = torch.load(tmp_path / "exp" / "1epoch.pth", weights_only=True)
    assert weights["separator.rnn.nbrnn.weight_hh_l0"].shape == (16, 4)
    capsys.readouterr()
    assert main(["train", *small]) == 0
    assert "up to date" in capsys.readouterr().out
    (tmp_path / "size" / "small.yaml").write_text("rnn:\n  separator_conf:\n    unit: 6\n")
    assert main(["train", *small]) == 0
    assert "settings changed" in capsys.readouterr().out
    weights = torch.load(tmp_path / "exp" / "1epoch.pth", weights_only=True)
    assert weights["separator.rnn.nbrnn.weight_hh_l0"].shape == (24, 6)
