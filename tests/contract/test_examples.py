"""The examples of other toolkits run as they stand, where the toolkit is installed."""

import re
from importlib.util import find_spec

import pytest
from conftest import REPOSITORY, run_command

EXAMPLES = sorted((REPOSITORY / "docs" / "examples").glob("*_cmkt.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_transfers(example, tmp_path):
    toolkit = example.stem.removesuffix("_cmkt")
    if find_spec(toolkit) is None:  # importing it here would change the process of other tests
        pytest.skip(f"{toolkit} is not installed")
    result = run_command(tmp_path, "python", example)
    assert result.returncode == 0, result.stderr
    losses = re.findall(r"^loss_se (\S+)  loss_cma (\S+)$", result.stdout, re.M)
    first, last = ([float(value) for value in losses[n]] for n in (0, -1))
    assert last[0] < first[0], "loss_se falls"
    assert last[1] < first[1], "loss_cma falls"
    assert float(re.search(r"'transfer_gap': (\S+),", result.stdout)[1]) > 0.2
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 60
