"""Losses of a toy problem, so that no change alters the method unnoticed.

Weights and data come from a formula and not from a random generator, which may change with torch.
All but `deep` and `text` were also computed by an independent float64 implementation in NumPy.
"""

import pytest
import torch

from cmkt.transfer import CrossModalTransfer


def wave(*shape: int, phase: float) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * 0.7 + phase).sin().float().view(shape)


def toy(**conf):
    model = CrossModalTransfer(4, 3, **conf)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(0.5 * wave(*parameter.shape, phase=number))
    acoustic, text = wave(3, 12, 4, phase=0.3), wave(3, 4, 3, phase=1.1)
    text[2] = 0
    return model, (acoustic, torch.tensor([12, 9, 10]), text, torch.tensor([4, 3, 1]))


SMALL = {"width": 8, "heads": 2}


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        ({"alignment": SMALL}, 1.006162),
        ({"alignment": SMALL, "reduction": "sum"}, 3.588202),
        ({"alignment": {**SMALL, "layers": 2, "residual": False}}, 1.057249),
        ({"alignment": {**SMALL, "query": "text"}}, 1.016799),
        ({"alignment": SMALL, "misalignment": {"mode": "fixed", "maximum": 1}}, 1.304795),
        (
            {
                "alignment": SMALL,
                "misalignment": {"mode": "fixed", "unit": "frame", "maximum": 3, "edges": "wrap"},
            },
            1.005963,
        ),
    ],
    ids=["default", "sum", "deep", "text", "token shift", "frame shift"],
)
def test_golden_loss(conf, expected):
    model, inputs = toy(**conf)
    assert model(*inputs).item() == pytest.approx(expected, abs=1e-5)


def test_golden_diagnostics():
    model, inputs = toy(alignment=SMALL)
    values = model.diagnostics(*inputs)
    assert values["cos_matched"].item() == pytest.approx(-0.025201, abs=1e-5)
    assert values["cos_mismatched"].item() == pytest.approx(-0.025745, abs=1e-5)
