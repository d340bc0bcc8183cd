"""Bootstrap intervals against known answers and their coverage."""

import numpy as np
import pytest

from cmkt.evaluate.statistics import bootstrap_mean, paired_difference


def test_interval_matches_the_normal_approximation():
    values = np.random.default_rng(0).normal(5, 2, 400)
    interval = bootstrap_mean(values, resamples=10000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)
    assert (interval.n_utterances, interval.n_seeds) == (400, 1)


def test_interval_equals_a_plain_loop_in_distribution():
    values = np.random.default_rng(1).exponential(1, (3, 25))
    rng = np.random.default_rng(2)
    means = [
        values[np.ix_(rng.integers(0, 3, 3), rng.integers(0, 25, 25))].mean() for _ in range(10000)
    ]
    interval = bootstrap_mean(values, resamples=10000)
    assert [interval.low, interval.high] == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.02
    )


def test_same_values_give_the_same_interval_and_constants_a_point():
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    constant = bootstrap_mean(np.full((2, 9), 3.0))
    assert (constant.mean, constant.low, constant.high) == pytest.approx((3, 3, 3))


def test_coverage_is_near_its_level():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_mean(rng.normal(1, 1, 40), resamples=400) for _ in range(400)]
    covered = np.mean([i.low <= 1 <= i.high for i in intervals])
    assert 0.90 <= covered <= 0.98


def test_interval_covers_the_spread_between_seeds():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 1, (8, 1))  # each training is off by its own amount
    values = effect + rng.normal(0, 0.1, (8, 500))
    together = bootstrap_mean(values)
    single = bootstrap_mean(values[0])
    assert together.n_seeds == 8
    assert together.high - together.low > 20 * (single.high - single.low)


def test_one_utterance_has_no_bounds():
    interval = bootstrap_mean(np.array([2.0]))
    assert (interval.mean, interval.low, interval.high) == (2.0, None, None)
    assert interval.includes_zero


def test_pairing_removes_the_spread_between_utterances():
    rng = np.random.default_rng(0)
    easy = rng.normal(0, 10, (2, 50))
    difference = paired_difference(easy + 0.5 + rng.normal(0, 0.1, easy.shape), easy)
    assert 0.4 < difference.low < 0.5 < difference.high < 0.6
    assert not difference.includes_zero
    assert paired_difference(easy, easy[:, ::-1]).includes_zero


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_nothing_to_average_is_an_error(values):
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean(np.array(values))


def test_unpaired_values_are_an_error():
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(np.zeros(3), np.zeros(4))
