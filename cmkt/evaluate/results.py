"""Collects the scores of all experiments and compares systems over utterances and seeds."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from cmkt.errors import CmktError
from cmkt.evaluate.score import read_scores, snr_groups
from cmkt.evaluate.statistics import Interval, bootstrap_mean, paired_difference
from cmkt.stage import MARKER

# `--text_source` whose gain is none of the text's.
CONTROLS = ("shuffled", "random")
NOISY = "noisy"


@dataclass
class Run:
    """The scores of one training (or of the noisy input) on one test set.

    Args:
        tag: experiment folder, for example `blstm_seed0`.
        test_set: name of the test set.
        values: {metric: {utterance: score, None for a failure}}.
        snr_group: SNR group in dB, as text, by utterance; may lack any.
        failures: {utterance: its first failure}.
        utterances: all ids of the reference list.
    """

    tag: str
    test_set: str
    values: dict[str, dict[str, float | None]]
    snr_group: dict[str, str]
    failures: dict[str, str]
    utterances: list[str]

    @property
    def system(self) -> str:
        """The tag without its seed."""
        return split_tag(self.tag)[0]

    @property
    def seed(self) -> int | None:
        """The seed; None for a system that is not trained."""
        return split_tag(self.tag)[1]


def split_tag(tag: str) -> tuple[str, int | None]:
    """Split `<system>_seed<k>` into system and seed; the seed is None if there is none."""
    match = re.fullmatch(r"(.+)_seed(\d+)", tag)
    return (match[1], int(match[2])) if match else (tag, None)


def read_run(folder: Path) -> Run:
    """Read `exp/<tag>/scores/<set>/utterances.tsv`."""
    scores = read_scores(folder / "utterances.tsv")
    values: dict[str, dict[str, float | None]] = {}
    failures: dict[str, str] = {}
    for score in scores:
        values.setdefault(score.metric, {})[score.utterance] = score.value
        if score.failure:
            failures.setdefault(score.utterance, score.failure)
    snrs = {score.utterance: score.snr for score in scores}
    return Run(
        folder.parent.parent.name, folder.name, values, snr_groups(snrs), failures, list(snrs)
    )


def collect_runs(expdir: Path) -> list[Run]:
    """Read all finished scores under `expdir`, sorted by system, seed and test set.

    Raises:
        CmktError: there are none.
    """
    folders = [marker.parent for marker in expdir.glob(f"*/scores/*/{MARKER}")]
    # A folder whose name starts with a dot is the unfinished work of a stage.
    runs = [read_run(folder) for folder in folders if not folder.name.startswith(".")]
    if not runs:
        raise CmktError("no scores found", expdir, remedy="run stage 8 (cmkt score) first")
    return sorted(runs, key=lambda r: (r.system, -1 if r.seed is None else r.seed, r.test_set))


def group_systems(runs: list[Run], has_transfer: dict[str, bool]) -> dict[str, list[Run]]:
    """Group runs of one test set by system: noisy first, then baselines, then those with transfer.

    Args:
        runs: of one test set.
        has_transfer: by system.
    """
    names = sorted(
        {run.system for run in runs}, key=lambda n: (n != NOISY, has_transfer.get(n, False), n)
    )
    return {name: [run for run in runs if run.system == name] for name in names}


def read_config(expdir: Path, tag: str) -> dict:
    """Read a training's config.yaml; empty for a system that was not trained here."""
    path = expdir / tag / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


def baseline_of(system: str, has_transfer: dict[str, bool]) -> str | None:
    """Return the system without transfer whose name is the longest prefix of `system`'s."""
    candidates = [
        name
        for name, transfer in has_transfer.items()
        if not transfer and name != NOISY and system.startswith(f"{name}_")
    ]
    return max(candidates, key=len, default=None)


def controls_of(system: str, systems: Iterable[str]) -> list[str]:
    """Return the systems trained as this one, but with other texts that carry no knowledge."""
    return [name for name in systems if name in {f"{system}_{c}" for c in CONTROLS}]


def score_matrix(
    runs: list[Run], metric: str, utterances: list[str]
) -> np.ndarray | None:  # (seeds, utterances)
    """Stack the scores of several runs; None if there are no utterances."""
    rows = [[run.values[metric][u] for u in utterances] for run in runs]
    return np.array(rows, dtype=np.float64) if utterances and rows else None


def scored_by_all(runs: list[Run], metric: str, snr: str | None) -> list[str]:
    """List the utterances that every run has a value for.

    Args:
        runs: of one test set.
        metric: which metric.
        snr: keep only this SNR group; None keeps all.
    """
    tables = [run.values.get(metric, {}) for run in runs]
    return [
        utterance
        for utterance in tables[0]
        if all(table.get(utterance) is not None for table in tables)
        and (snr is None or runs[0].snr_group.get(utterance) == snr)
    ]


def mean_of(runs: list[Run], metric: str, snr: str | None = None) -> Interval | None:
    """Mean of one system over utterances and seeds; None if nothing was scored."""
    values = score_matrix(runs, metric, scored_by_all(runs, metric, snr))
    return None if values is None else bootstrap_mean(values)


def difference_of(
    system: list[Run], baseline: list[Run], metric: str, snr: str | None = None
) -> Interval | None:
    """Mean difference of two systems, paired by utterance and by seed.

    Args:
        system: runs of the system.
        baseline: runs of its baseline.
        metric: which metric.
        snr: keep only this SNR group; None keeps all.

    Returns:
        the interval; None if the two share no seed or no scored utterance.
    """
    ours, theirs = ({run.seed: run for run in runs} for runs in (system, baseline))
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    ours, theirs = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
    utterances = scored_by_all(ours + theirs, metric, snr)
    if not utterances:
        return None
    return paired_difference(
        score_matrix(ours, metric, utterances), score_matrix(theirs, metric, utterances)
    )
