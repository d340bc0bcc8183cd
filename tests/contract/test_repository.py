"""Every YAML, recipe, README command and the stage driver itself."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from speech_models import tiny_rivals

from cmkt.cli import VERBS, main
from cmkt.linguistic.config import read_config
from cmkt.linguistic.statistics import Moments
from cmkt.parallel import CLUSTERS

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    [*REPOSITORY.glob("conf/**/train_*.yaml"), *REPOSITORY.glob("egs/*/conf/**/train_*.yaml")]
)
LANGUAGE_MODELS = sorted(REPOSITORY.glob("conf/llm/*.yaml"))
CLUSTER_FILES = sorted(REPOSITORY.glob("conf/cluster/*.yaml"))
RECIPES = sorted(path.parent for path in REPOSITORY.glob("egs/*/run.sh"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_configuration_builds_and_steps(path, tmp_path):
    """Parse strictly, build, and take one training step on two utterances, one without text."""
    from cmkt.espnet_plugin.task import TransferEnhancementTask
    from cmkt.espnet_plugin.train import _parse

    args = _parse(TransferEnhancementTask, ["--config", str(path), "--output_dir", "x"], path)
    args.transfer_conf = {**args.transfer_conf, "linguistic_dim": 6, "vocabulary": 9}
    args.criterions = tiny_rivals(args.criterions, tmp_path)
    args.linguistic_statistics = str(tmp_path / "statistics.npz")
    moments = Moments()
    moments.add(np.random.default_rng(0).normal(size=(50, 6)))
    moments.save(tmp_path / "statistics.npz")
    model = TransferEnhancementTask.build_model(args).train()
    optimizer = torch.optim.Adam(model.parameters())
    text = torch.randn(2, 4, 6)
    text[1] = 0
    loss, stats, _ = model(
        torch.randn(2, 8000),
        torch.tensor([8000, 6000]),
        speech_ref1=torch.randn(2, 8000),
        speech_ref1_lengths=torch.tensor([8000, 6000]),
        linguistic=text,
        linguistic_lengths=torch.tensor([4, 1]),
        token_ids=torch.tensor([[1, 2, 3, 2], [0, 0, 0, 0]]),
        token_ids_lengths=torch.tensor([4, 1]),
    )
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss).all()
    transfers = args.transfer == "cmkt" and args.transfer_conf.get("alpha") != 1
    assert ("loss_cma" in stats) == transfers


@pytest.mark.parametrize("path", LANGUAGE_MODELS, ids=lambda p: p.stem)
def test_language_model_configuration_states_what_it_costs(path):
    assert read_config(path).model
    for words in ("licence:", "memory:", "store:", "-d"):
        assert words in path.read_text(), words


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda p: p.stem)
def test_cluster_configuration_names_a_cluster_that_takes_its_options(path):
    conf = yaml.safe_load(path.read_text())
    module, _, name = CLUSTERS[conf["env"]].partition(":")
    kind = getattr(pytest.importorskip(module), name)
    if conf["env"] == "local":
        return  # run for real in tests/unit/test_linguistic.py
    conf["options"]["interface"] = "lo"
    with kind(n_workers=0, **conf["options"]) as cluster:
        assert conf["options"]["walltime"] in cluster.job_script()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_no_loss_is_blind_to_sign_and_level(path):
    """With SI-SNR in the loss a training may end with inverted speech, which no metric shows."""
    names = [criterion["name"] for criterion in yaml.safe_load(path.read_text())["criterions"]]
    assert not {"si_snr", "ci_sdr", "fast_bss_eval_si_sdr"} & set(names)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.endswith("_cmkt")], ids=str)
def test_twin_differs_by_the_transfer_keys_only(path):
    twin = yaml.safe_load(path.read_text())
    base = yaml.safe_load(path.with_stem(path.stem.removesuffix("_cmkt")).read_text())
    assert twin.pop("transfer") == "cmkt"
    assert twin.pop("transfer_conf")
    assert twin == base


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_recipe_is_whole_and_its_dry_run_names_all_stages(recipe):
    for name in ("run.sh", "local/data.sh", "README.md"):
        assert (recipe / name).exists(), name
    done = subprocess.run([recipe / "run.sh", "--dry_run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("local/data.sh", "cmkt mix", "cmkt embed", "--collect_stats", "--seed 0",
                  "cmkt export", "cmkt enhance", "cmkt score", "cmkt report"):  # fmt: skip
        assert words in done.stdout


def run_sh(*arguments):
    return subprocess.run([REPOSITORY / "run.sh", *arguments], capture_output=True, text=True)


def test_run_sh_help_unknown_option_and_missing_stage(tmp_path):
    assert "--stop_stage" in run_sh("--help").stdout
    unknown = run_sh("--stop_stages", "3")
    assert unknown.returncode == 2 and "did you mean" in unknown.stderr
    assert run_sh("--stage", "three").returncode == 2
    missing = run_sh("--stage", "3", "--dumpdir", str(tmp_path / "dump"))
    assert missing.returncode == 1 and "--stage 2" in missing.stderr
    assert len((REPOSITORY / "run.sh").read_text().splitlines()) <= 150


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_help_imports_nothing_heavy():
    code = "import sys, cmkt.cli; cmkt.cli.main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'torch'" not in done.stdout and "'numpy'" not in done.stdout


def test_mixing_starts_without_what_few_mixtures_need():
    code = "import sys, cmkt.corpus.mix; print('scipy.signal' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_documented_commands_parse():
    """Each `cmkt` and `run.sh` line of the documents uses known verbs and options."""
    helps = {}
    for document in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"),
                     *REPOSITORY.glob("egs/*/README.md")]:  # fmt: skip
        text = document.read_text().replace("\\\n", " ")
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if not words:
                    continue
                if words[0] == "cmkt":
                    assert words[1] in VERBS, line
                elif words[0].endswith("run.sh"):
                    known = helps.setdefault("run.sh", run_sh("--help").stdout)
                    for word in words[1:]:
                        option = word.startswith("--") and " " not in word
                        assert not option or word in known, (document, word)


def imported(package: str) -> set[str]:
    """Return the modules that a package's code imports, wherever the statement stands."""
    names = set()
    for path in (REPOSITORY / "cmkt" / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
    return names


def test_imports_point_one_way():
    """`transfer` imports torch only; only the plugin imports ESPnet; text and use are apart."""
    outside = {name.split(".")[0] for name in imported("transfer")}
    assert outside <= {"torch", "cmkt", *sys.stdlib_module_names}
    assert all(n.startswith("cmkt.transfer") for n in imported("transfer") if n.startswith("cmkt"))
    assert not any(name.startswith("cmkt.enhance") for name in imported("linguistic"))
    assert not any(name.startswith("cmkt.linguistic") for name in imported("enhance"))
    for package in ("corpus", "linguistic", "transfer", "evaluate", "enhance"):
        assert not any(name.split(".")[0] == "espnet2" for name in imported(package)), package
