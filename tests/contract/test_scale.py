"""Training at scale: several processes, resume in the middle, accumulation, batches, cropping."""

import logging
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, data_options, speech_like, tiny_config, transfer_conf, write_config
from test_plugin import reporter, weights

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory
from cmkt.corpus.word_times import Word, read_word_times, write_word_times
from cmkt.errors import CmktError
from cmkt.linguistic.store import StoreWriter, finish_store
from cmkt.stage import MARKER, Stage

SECONDS = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.7}
WITHOUT_TEXT = {"train": {"a0", "a1", "b0", "b1", "c0"}, "valid": {"c0"}}


def make_store(folder: Path, text: dict[str, str]) -> None:
    generator = np.random.default_rng(1)
    with Stage(folder, [], {}).working_directory() as work:
        with StoreWriter(work, 1, "float32") as writer:
            for utterance, line in text.items():
                writer.write({utterance: (line, generator.normal(size=(3, 6)))}, {})
        meta = {"model": "toy", "revision": None, "layer": -1}
        finish_store(work, folder, {u: u for u in text}, text, meta)


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Path:
    """Mixtures in pairs of one length, so that each of two processes pads as one alone does.

    In batches of four, sorted by length, one has no text at all; of the others one process gets
    two utterances with text and the other process one. In the store `llm_all` all have text.
    """
    root = tmp_path_factory.mktemp("twins")
    generator = np.random.default_rng(0)
    (root / "noise").mkdir()
    soundfile.write(root / "noise" / "a.wav", generator.normal(0, 0.1, 4 * RATE), RATE)
    for name, kinds in (("train", "abcd"), ("valid", "cd")):
        folder = root / "data" / name
        folder.mkdir(parents=True)
        wav = {f"{kind}{n}": str(folder / f"{kind}{n}.wav") for kind in kinds for n in (0, 1)}
        for utterance, path in wav.items():
            soundfile.write(path, speech_like(generator, SECONDS[utterance[0]]), RATE)
        everything = {u: f"the words {u}" for u in wav}
        text = {u: line for u, line in everything.items() if u not in WITHOUT_TEXT[name]}
        DataDirectory(wav, dict.fromkeys(wav, "speaker"), text=text).write(folder)
        write_word_times(folder / "ctm", {
            u: [Word("THE", 0, 0.2), Word("words,", 0.2, 0.4), Word(u, 0.4, 0.6)] for u in wav
        })  # fmt: skip
        options = ["--noise_dir", str(root / "noise"), "--snr=0:5", "--nj", "1"]
        options += ["--output_dir", str(root / "audio" / name)]
        assert main(["mix", "--data_dir", str(folder), *options]) == 0
        make_store(root / "llm" / name, text)
        make_store(root / "llm_all" / name, everything)
    assert main(["train", "--collect_stats", "true", "--output_dir", str(root / "stats"),
                 *data_options(root)]) == 0  # fmt: skip
    return root


def fit(folder: Path, config: dict, twins: Path, *more, store="llm") -> int:
    """Train; without --train_shape_file among the options, on all of the training set."""
    path = write_config(folder.with_name(f"{folder.name}.{os.getpid()}.yaml"), config)
    options = ["--config", str(path), "--output_dir", str(folder), *data_options(twins)]
    if "--train_shape_file" not in more:
        options += ["--stats_dir", str(twins / "stats")]
    return main(["train", *options, "--llm_dir", str(twins / store), *more])


def transferring(**changes) -> dict:
    """Return a configuration whose result does not depend on random draws."""
    conf = transfer_conf(misalignment={"mode": "fixed", "maximum": 1})
    conf = {**conf, **changes.pop("transfer_conf", {})}
    settings = {"optim": "sgd", "optim_conf": {"lr": 0.1}}
    return tiny_config(transfer="cmkt", transfer_conf=conf, **{**settings, **changes})


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def change_norm(one: dict, other: dict) -> float:
    squares = [(one[key] - other[key]).double().square().sum() for key in one]
    return torch.stack(squares).sum().sqrt().item()


@pytest.mark.parametrize("alpha", [0.5, {"schedule": "balanced", "every": 1}])
def test_two_processes_train_as_one(alpha, tmp_path, twins):
    """Utterances with text count alike, whichever process they are on; a batch has none at all."""
    config = transferring(transfer_conf={"alpha": alpha})
    assert fit(tmp_path / "one", config, twins) == 0
    options = ["--dist_backend", "gloo", "--dist_init_method", f"file://{tmp_path}/meet"]
    options += ["--multiprocessing_distributed", "true", "--dist_world_size", "2"]
    # Forked, since ESPnet is imported here already; both meet in a process group of torch.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=lambda rank: sys.exit(
                fit(tmp_path / "two", config, twins, *options, "--dist_rank", str(rank))
            ),
            args=(rank,),
        )
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4
    one, two = reporter(tmp_path / "one")[2], reporter(tmp_path / "two")[2]
    for key in ("loss_se", "loss_cma", "loss"):
        assert two["train"][key] == pytest.approx(one["train"][key], abs=1e-4)
    assert two["valid"]["loss_se"] == pytest.approx(one["valid"]["loss_se"], abs=1e-4)
    assert np.isfinite(two["valid"]["transfer_gap"])  # on one of the processes it is not known
    assert (tmp_path / "two" / MARKER).exists()
    # The number of processes makes no other training.
    assert fit(tmp_path / "two", config, twins) == 0
    assert not list(tmp_path.glob("two.old-*"))


class Interruption:
    """Interrupts a training as Ctrl-C would, when the model is called for the n-th time."""

    def __init__(self, call: int):
        self.left = call

    def __enter__(self):
        hook = torch.nn.modules.module.register_module_forward_pre_hook(self._count)
        self.remove = hook.remove

    def __exit__(self, *exception):
        self.remove()

    def _count(self, module, inputs):
        if type(module).__name__ == "TransferEnhancementModel":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def test_interrupted_within_an_epoch_and_resumed_equals_uninterrupted(tmp_path, twins):
    """Dropout and shifts are drawn anew: from the epoch, not from where the training stopped."""
    separator = {"num_spk": 1, "layer": 2, "unit": 8, "dropout": 0.3}
    config = transferring(
        max_epoch=3, separator_conf=separator, num_workers=1, keep_nbest_models=3,
        transfer_conf={"misalignment": {"mode": "random", "maximum": 1}}, optim="adam",
        optim_conf={"lr": 0.01}, scheduler="reducelronplateau", scheduler_conf={"patience": 0},
        val_scheduler_criterion=["valid", "loss_se"],
    )  # fmt: skip
    assert fit(tmp_path / "whole", config, twins) == 0
    calls_per_epoch = 3  # two batches of training, one of validation
    with Interruption(calls_per_epoch + 2):
        assert fit(tmp_path / "cut", config, twins) == 130
    assert reporter(tmp_path / "cut").keys() == {1}
    assert not (tmp_path / "cut" / MARKER).exists()
    assert fit(tmp_path / "cut", config, twins) == 0
    whole, cut = reporter(tmp_path / "whole"), reporter(tmp_path / "cut")
    for epoch in (1, 2, 3):
        for part in ("train", "valid"):
            losses = {k: v for k, v in whole[epoch][part].items() if k.startswith("loss")}
            assert len(losses) > 3
            assert losses == {key: cut[epoch][part][key] for key in losses}
    assert largest_difference(weights(tmp_path / "whole", 3), weights(tmp_path / "cut", 3)) == 0


def test_accumulated_gradients_equal_a_larger_batch(tmp_path, twins):
    """Where each part has as many utterances with text, all of one length."""
    shapes = tmp_path / "shapes"
    lines = (twins / "stats" / "train" / "speech_mix_shape").read_text().splitlines(keepends=True)
    shapes.write_text("".join(line for line in lines if line[0] in "cd"))
    more = ["--train_shape_file", str(shapes)]
    more += ["--valid_shape_file", str(twins / "stats" / "valid" / "speech_mix_shape")]
    for name, changes in {
        "large": {"batch_size": 4},
        "parts": {"batch_size": 2, "accum_grad": 2, "valid_batch_size": 4},
    }.items():
        config = transferring(max_epoch=3, **changes)
        assert fit(tmp_path / name, config, twins, *more, store="llm_all") == 0
    assert largest_difference(weights(tmp_path / "large", 3), weights(tmp_path / "parts", 3)) < 1e-5
    with_one_step = transferring(max_epoch=3, batch_size=2, valid_batch_size=4)
    assert fit(tmp_path / "steps", with_one_step, twins, *more, store="llm_all") == 0
    assert largest_difference(weights(tmp_path / "large", 3), weights(tmp_path / "steps", 3)) > 1e-4


def test_clipping_bounds_the_step(tmp_path, twins):
    found = {}
    for name, settings in {
        "begin": {"optim_conf": {"lr": 0.0}},
        "clipped": {"optim_conf": {"lr": 1.0}, "grad_clip": 1e-3},
        "free": {"optim_conf": {"lr": 1.0}, "grad_clip": 1e3},
    }.items():
        config = transferring(max_epoch=1, batch_size=8, **settings)
        assert fit(tmp_path / name, config, twins) == 0
        found[name] = weights(tmp_path / name, 1)
    assert change_norm(found["begin"], found["clipped"]) == pytest.approx(1e-3, rel=1e-2)
    assert change_norm(found["begin"], found["free"]) > 1e-2


def test_alignment_stays_in_float32_under_bfloat16():
    from cmkt.espnet_plugin.task import TransferEnhancementTask

    torch.manual_seed(0)
    conf = transfer_conf(linguistic_dim=6, loss={"cosine": 1.0, "contrastive": 1.0})
    args = TransferEnhancementTask.get_parser().parse_args(["--output_dir", "unused"])
    for key, value in {**tiny_config(), "transfer": "cmkt", "transfer_conf": conf}.items():
        setattr(args, key, value)
    model = TransferEnhancementTask.build_model(args).eval()  # no random shifts
    seen = []
    model.transfer.alignment.register_forward_hook(
        lambda _, inputs, out: seen.append((inputs[0].dtype, out.zhat.dtype))
    )
    speech, lengths = torch.randn(3, 8000), torch.tensor([8000, 6000, 4000])
    batch = {"speech_mix": speech, "speech_mix_lengths": lengths, "speech_ref1": 0.5 * speech,
             "linguistic": torch.randn(3, 5, 6),
             "linguistic_lengths": torch.tensor([5, 4, 3])}  # fmt: skip
    losses = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, stats, _ = model(**batch)
        losses.append(stats["loss_cma"])
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert seen[-1][1] == losses[-1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


def test_batches_smaller_than_the_longest_utterance_are_refused(tmp_path, twins, capsys):
    config = tiny_config(batch_type="numel", batch_bins=14000, max_epoch=1)
    assert fit(tmp_path / "exp", config, twins) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for words in ("speech_mix_shape:1: ", "batch_bins 14000", "a0, of 14400", "--max_duration"):
        assert words in error
    assert not (tmp_path / "exp" / "checkpoint.pth").exists()
    # Validation is not cropped, and has a number of its own.
    more = ["--max_duration", "0.5", "--valid_batch_bins", "11000"]
    assert fit(tmp_path / "exp", config, twins, *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "valid_batch_bins 11000" in error and "max_duration" not in error
    assert fit(tmp_path / "exp", config, twins, *more[:2]) == 0


def trained_on(twins: Path, folder: Path, config: dict, *more) -> list[dict]:
    """Train, and return what the model was given in training."""
    from cmkt.espnet_plugin.model import TransferEnhancementModel

    batches, handles = [], []

    def keep(model, _, arguments):
        if model.training:
            batches.append(arguments)

    def listen_to(model, name, _):  # a hook for all modules sees no keywords
        if isinstance(model, TransferEnhancementModel) and name == "encoder":
            handles.append(model.register_forward_pre_hook(keep, with_kwargs=True))

    building = torch.nn.modules.module.register_module_module_registration_hook(listen_to)
    try:
        assert fit(folder, config, twins, *more) == 0
    finally:
        building.remove()
    return batches


def test_long_utterances_are_cropped_with_their_text(tmp_path, twins):
    """At most 0.45 s: two of the three words, with their embeddings and no other."""
    assert read_word_times(twins / "audio" / "train" / "ctm").keys() == {
        f"{kind}{n}" for kind in "abcd" for n in (0, 1)
    }
    config = transferring(batch_type="numel", batch_bins=14400, max_epoch=4, num_workers=0)
    more = ["--max_duration", "0.45"]
    batches = trained_on(twins, tmp_path / "exp", config, *more)
    log = (tmp_path / "exp" / "train.log").read_text()
    assert "8 of 8 utterances are longer than 0.45 s and are cropped; 8 of these at words" in log
    from cmkt.espnet_plugin.tokens import read_vocabulary

    ids = read_vocabulary(tmp_path / "exp")
    windows, same = set(), {}
    for batch in batches:
        lengths = batch["speech_mix_lengths"]
        assert lengths.max() <= 7200 and (lengths.diff() <= 0).all()  # the longest comes first
        for row, utterance in enumerate(batch["utt_id"]):
            kept = batch["token_ids"][row, : batch["token_ids_lengths"][row]].tolist()
            if utterance in WITHOUT_TEXT["train"]:
                assert kept == [0]
            else:
                said = [ids["the"], ids["words"], ids[utterance]]
                assert kept in (said[:2], said[1:])
            windows.add((utterance, tuple(kept)))
            same.setdefault(utterance, []).append(batch["speech_mix"][row, :100])
    assert len(windows) > 8  # other words in other epochs
    # The baseline hears the same audio.
    base = {key: value for key, value in config.items() if not key.startswith("transfer")}
    heard: dict[str, list] = {}
    for batch in trained_on(twins, tmp_path / "base", base, *more):
        for row, utterance in enumerate(batch["utt_id"]):
            heard.setdefault(utterance, []).append(batch["speech_mix"][row, :100])
    for utterance, pieces in same.items():
        assert all(torch.equal(a, b) for a, b in zip(pieces, heard[utterance], strict=True))


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path, twins, capsys):
    base = tiny_config(max_epoch=1)
    assert fit(tmp_path / "base", base, twins) == 0
    frozen = {"max_epoch": 1, "optim": "sgd", "optim_conf": {"lr": 0.0}}
    given = ["--init_param", str(tmp_path / "base" / "valid.loss_se.best.pth")]
    # The weights of a baseline begin its CMKT twin.
    assert fit(tmp_path / "twin", transferring(**frozen), twins, *given) == 0
    twin = weights(tmp_path / "twin", 1)
    assert all(torch.equal(twin[key], v) for key, v in weights(tmp_path / "base", 1).items())
    capsys.readouterr()

    def refused(name: str, config: dict, *more) -> str:
        assert fit(tmp_path / name, config, twins, *more) == 1
        assert not (tmp_path / name / "checkpoint.pth").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    error = refused("tcn", tiny_config("tcn", max_epoch=1), *given)
    assert str(given[1]) in error
    for words in ("separator rnn", "separator tcn", "separator.linear", "only there"):
        assert words in error
    wide = {**base, "separator_conf": {"num_spk": 1, "layer": 1, "unit": 16}}
    assert "there and" in refused("wide", wide, *given)
    assert "no parameter fits" not in refused("wide", wide, *given)
    assert fit(tmp_path / "part", wide, twins, *given, "--ignore_init_mismatch", "true") == 0
    # The other way round the transfer is to be left out, as the message says.
    given = ["--init_param", str(tmp_path / "twin" / "valid.loss_se.best.pth")]
    error = refused("plain", {**base, **frozen}, *given)
    remedy = error.rpartition("--init_param ")[2].rstrip(")")
    assert fit(tmp_path / "plain", {**base, **frozen}, twins, "--init_param", remedy) == 0
    for path, words in ((tmp_path / "none.pth", "no such file"), (tmp_path / "base.yaml", "not a")):
        if words == "not a":
            path.write_text("text")
        assert words in refused("broken", base, "--init_param", str(path))


SLURM = {  # of the second of two nodes
    "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04]",
}  # fmt: skip


@pytest.mark.parametrize("node", [0, 1])
def test_slurm_names_the_process(node, monkeypatch):
    from espnet2.train.distributed_utils import get_rank, get_world_size

    from cmkt.espnet_plugin.processes import is_leader
    from cmkt.espnet_plugin.task import TransferEnhancementTask

    for name, value in {**SLURM, "SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}.items():
        monkeypatch.setenv(name, value)
    command = ["--output_dir", "exp", "--dist_launcher", "slurm", "--ngpu", "4"]
    command += ["--multiprocessing_distributed", "true"]
    args = TransferEnhancementTask.get_parser().parse_args(command)
    assert (get_rank(None, "slurm"), get_world_size(None, "slurm")) == (node, 2)
    assert is_leader(args) == (node == 0)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a task for each GPU
    with pytest.raises(CmktError, match="ntasks_per_node=1"):
        is_leader(args)
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # sbatch without srun
    with pytest.raises(CmktError, match="srun"):
        is_leader(args)


def test_several_gpus_in_one_process_are_refused_with_a_transfer(tmp_path, twins, capsys):
    assert fit(tmp_path / "exp", transferring(), twins, "--ngpu", "4") == 1
    assert "--multiprocessing_distributed true" in capsys.readouterr().err


def test_without_a_launcher_the_variables_of_torchrun_count(monkeypatch):
    from cmkt.espnet_plugin.processes import is_leader
    from cmkt.espnet_plugin.task import TransferEnhancementTask

    parser = TransferEnhancementTask.get_parser()
    args = parser.parse_args(["--output_dir", "exp", "--multiprocessing_distributed", "false"])
    assert is_leader(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, leads in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_leader(args) is leads


def test_the_first_process_of_a_gpu_node_logs(tmp_path, twins):
    """ESPnet starts it without the logging of `cmkt train`; here it has a CPU and no others."""
    from cmkt.espnet_plugin.task import TransferEnhancementTask

    config = tiny_config(max_epoch=1)
    command = ["--config", str(write_config(tmp_path / "c.yaml", config))]
    command += ["--output_dir", str(tmp_path / "exp"), "--dist_backend", "gloo"]
    command += ["--dist_init_method", f"file://{tmp_path}/meet", "--dist_world_size", "1"]
    for mode in ("train", "valid"):
        for name, key in (("wav.scp", "speech_mix"), ("spk1.scp", "speech_ref1")):
            audio = twins / "audio" / mode / name
            command += [f"--{mode}_data_path_and_name_and_type", f"{audio},{key},sound"]
        shapes = twins / "stats" / mode / "speech_mix_shape"
        command += [f"--{mode}_shape_file", str(shapes)]
    args = TransferEnhancementTask.get_parser().parse_args([*command, "--dist_rank", "0"])
    args.distributed = args.multiprocessing_distributed = True
    args.version = "0"
    (tmp_path / "exp").mkdir()

    def start():
        logging.getLogger().handlers = []
        TransferEnhancementTask.main_worker(args)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(100)
    assert process.exitcode == 0
    assert "1epoch results:" in (tmp_path / "exp" / "train.log").read_text()
