"""On a GPU: the alignments' numbers, half precision, and validation with compared gradients."""

import math

import pytest
import torch
from conftest import tiny_config, transfer_conf
from test_plugin import reporter, train

from cmkt.transfer import ALIGNMENTS, CrossModalTransfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


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


@pytest.mark.parametrize("amp", ["false", "true"])
def test_training_on_a_gpu(amp, tmp_path, mixtures, stores, statistics):
    """Validation takes gradients through a recurrent network, which cuDNN refuses in evaluation."""
    conf = transfer_conf(tap="first", alpha={"schedule": "balanced", "every": 1})
    layers = {"num_spk": 1, "layer": 2, "unit": 8}
    config = tiny_config(transfer="cmkt", transfer_conf=conf, separator_conf=layers)
    options = ["--ngpu", "1", "--use_amp", amp]
    assert train(tmp_path / "exp", config, mixtures, stores, statistics, *options) == 0
    values = reporter(tmp_path / "exp")[2]["valid"]
    for name in ("loss_se", "transfer_gap", "gradient_share", "weight_cma"):
        assert math.isfinite(float(values[name])), name
