"""On a GPU: the alignments' numbers, half precision, a process group, and a compiled separator."""

import math
import shutil

import pytest
import torch
from conftest import tiny_config, transfer_conf
from test_plugin import reporter, train

from cmkt.transfer import ALIGNMENTS, CrossModalTransfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


EPOCHS = 4


def make_batch(device):
    torch.manual_seed(0)
    acoustic, text = torch.randn(4, 200, 32), torch.randn(4, 20, 16)
    lengths = torch.tensor([200, 150, 120, 40]), torch.tensor([20, 12, 9, 3])
    batch = (acoustic, lengths[0], text, lengths[1], torch.randint(50, (4, 20)))
    return [value.to(device) for value in batch]


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_loss_and_gradient_are_those_of_the_cpu(kind):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        conf = {
            "alignment": {"type": kind},
            "vocabulary": 50,
            "loss": {"cosine": 1, "contrastive": 1},
        }
        transfer = CrossModalTransfer(32, 16, **conf).to(device)
        acoustic, *rest = make_batch(device)
        acoustic.requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = transfer(acoustic, *rest)
        loss.backward()
        results.append((loss.item(), acoustic.grad.cpu()))
    (on_cpu, gradient), (on_gpu, other) = results
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.99


def gpu_config() -> dict:
    """Return a tiny training whose tap splits a recurrent network, with steps small enough for
    the losses of two precisions to stay close."""
    conf = transfer_conf(tap="first", alpha={"schedule": "balanced", "every": 1})
    layers = {"num_spk": 1, "layer": 2, "unit": 8}
    return tiny_config(transfer="cmkt", transfer_conf=conf, separator_conf=layers,
                       max_epoch=EPOCHS, optim_conf={"lr": 0.003})  # fmt: skip


def losses(statistics: dict) -> list[float]:
    """Return the enhancement loss of every epoch, in training and in validation."""
    return [float(statistics[epoch][mode]["loss_se"])
            for epoch in range(1, EPOCHS + 1) for mode in ("train", "valid")]  # fmt: skip


@pytest.fixture(scope="module")
def single_precision(tmp_path_factory, mixtures, stores, statistics) -> dict:
    """Return what a training in float32 logged; others are held against it."""
    folder = tmp_path_factory.mktemp("single") / "exp"
    assert train(folder, gpu_config(), mixtures, stores, statistics, "--ngpu", "1") == 0
    return reporter(folder)


def check_learning(statistics: dict) -> None:
    """Everything is finite and the loss falls.

    Validation takes gradients through a recurrent network, which cuDNN refuses in evaluation.
    """
    for epoch in range(1, EPOCHS + 1):
        for name in ("loss_se", "transfer_gap", "gradient_share", "weight_cma"):
            assert math.isfinite(float(statistics[epoch]["valid"][name])), (epoch, name)
    valid = losses(statistics)[1::2]
    assert valid[-1] < valid[0]


def test_training_in_single_precision(single_precision):
    check_learning(single_precision)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_learns_the_same(
    precision, single_precision, tmp_path, mixtures, stores, statistics
):
    options = ["--ngpu", "1", "--use_amp", "true", "--amp_dtype", precision]
    assert train(tmp_path / "exp", gpu_config(), mixtures, stores, statistics, *options) == 0
    half = reporter(tmp_path / "exp")
    check_learning(half)
    # float16 may skip its first updates, until its loss scale fits.
    assert losses(half)[:2] == pytest.approx(losses(single_precision)[:2], rel=0.05)
    assert losses(half)[0] != losses(single_precision)[0]


def test_a_process_group_of_one_gpu_trains_the_same(
    single_precision, tmp_path, mixtures, stores, statistics, monkeypatch
):
    """NCCL and DistributedDataParallel on one GPU, where ESPnet by itself makes no group."""
    from espnet2.tasks import abs_task

    resolve = abs_task.resolve_distributed_mode

    def ask_for_a_group(args):
        resolve(args)
        args.distributed = True

    monkeypatch.setattr(abs_task, "resolve_distributed_mode", ask_for_a_group)
    options = ["--ngpu", "1", "--multiprocessing_distributed", "true", "--dist_backend", "nccl"]
    options += ["--dist_init_method", f"file://{tmp_path}/meet"]
    options += ["--dist_world_size", "1", "--dist_rank", "0"]
    try:
        assert train(tmp_path / "exp", gpu_config(), mixtures, stores, statistics, *options) == 0
        assert torch.distributed.get_backend() == "nccl"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    together = losses(reporter(tmp_path / "exp"))
    assert together == pytest.approx(losses(single_precision), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["rnn", "tcn"])
def test_a_compiled_separator_equals_the_eager_one(separator, monkeypatch):
    """The second step puts new hooks on the compiled modules, which must be heard as well."""
    from torch.utils._triton import has_triton

    from cmkt.espnet_plugin.task import TransferEnhancementTask

    if not (has_triton() and shutil.which("cc")):
        pytest.skip("torch.compile needs Triton and a C compiler")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    speech, lengths = torch.randn(3, 8000), torch.tensor([8000, 6000, 4000])
    text, tokens = torch.randn(3, 5, 6), torch.tensor([5, 2, 3])
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        args = TransferEnhancementTask.get_parser().parse_args(["--output_dir", "unused"])
        conf = {"transfer": "cmkt", "transfer_conf": transfer_conf(linguistic_dim=6)}
        for key, value in {**tiny_config(separator), **conf}.items():
            setattr(args, key, value)
        model = TransferEnhancementTask.build_bare_model(args).cuda().train()
        if compiled:
            model.separator.compile()
        values = []
        for level in (1, 2):
            batch = {"speech_mix": level * speech, "speech_ref1": speech, "linguistic": text,
                     "speech_mix_lengths": lengths, "speech_ref1_lengths": lengths,
                     "linguistic_lengths": tokens}  # fmt: skip
            model.zero_grad()
            torch.manual_seed(level)  # of the misalignment
            loss, stats, _ = model(**{key: value.cuda() for key, value in batch.items()})
            loss.sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            values.append((loss.item(), stats["loss_cma"].item(), gradient))
        results.append(values)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    for eager, compiled in zip(*results, strict=True):
        assert compiled[:2] == pytest.approx(eager[:2], rel=1e-3)
        assert (compiled[2] - eager[2]).norm() < 1e-3 * eager[2].norm()
