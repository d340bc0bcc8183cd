"""Bootstrap intervals of means over utterances and over training seeds."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval.

    Args:
        mean: the mean over all seeds and utterances.
        low: lower bound; None for a single utterance, which shows no spread.
        high: upper bound; None likewise.
        n_utterances: utterances in the mean.
        n_seeds: trainings in the mean. With one, the interval knows nothing of the spread
            between trainings.
    """

    mean: float
    low: float | None
    high: float | None
    n_utterances: int
    n_seeds: int

    @property
    def includes_zero(self) -> bool:
        """Whether 0 lies within the bounds; also when there are none."""
        return self.low is None or self.low <= 0 <= self.high


def bootstrap_mean(
    values: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, chapter 13).

    Every resample draws seeds, then utterances, both with replacement. All seeds score the same
    utterances, so one draw of utterances serves all seeds of a resample.

    Args:
        values: (utterances,) or (seeds, utterances), finite.
        level: coverage.
        resamples: number of resamples.
        seed: of the random draws; the same values give the same interval.

    Raises:
        ValueError: no values, or values that are not finite.
    """
    values = np.atleast_2d(np.asarray(values, dtype=np.float64))  # (S, U)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("a bootstrap needs at least one value, all finite")
    n_seeds, n_utterances = values.shape
    mean = float(values.mean())
    if n_utterances == 1:
        return Interval(mean, None, None, n_utterances, n_seeds)
    rng = np.random.default_rng(seed)
    # How often a resample holds each seed and each utterance; the mean is then two products.
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples)  # (R, S)
    utterances = rng.multinomial(
        n_utterances, np.full(n_utterances, 1 / n_utterances), resamples
    )  # (R, U)
    means = np.sum((seeds @ values) * utterances, axis=1) / (n_seeds * n_utterances)  # (R,)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n_utterances, n_seeds)


def paired_difference(
    system: np.ndarray, baseline: np.ndarray, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Interval of the mean of system minus baseline, paired by utterance and by seed.

    Args:
        system: (utterances,) or (seeds, utterances).
        baseline: the same shape, with the same seeds and utterances in the same places.
        level: coverage.
        resamples: number of resamples.

    Raises:
        ValueError: shapes that differ, no values, or values that are not finite.
    """
    system, baseline = np.asarray(system, np.float64), np.asarray(baseline, np.float64)
    if system.shape != baseline.shape:
        raise ValueError(f"not paired: shapes {system.shape} and {baseline.shape}")
    return bootstrap_mean(system - baseline, level, resamples)
