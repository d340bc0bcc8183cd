"""The plain PyTorch loop of docs/method.md runs as printed."""

import re
import time
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "method.md"


def test_plain_pytorch_loop_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert "espnet" not in code
    assert len(code.splitlines()) <= 32
    with torch.random.fork_rng():
        begin = time.perf_counter()
        exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
    assert time.perf_counter() - begin < 5
    printed = capsys.readouterr().out
    values = [[float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in printed.splitlines()]
    first, last = values[0], values[-2]
    assert last[0] < first[0], "loss_se falls"
    assert last[1] < first[1], "loss_cma falls"
    assert "transfer_gap" in printed.splitlines()[-1]
