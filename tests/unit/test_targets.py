"""Standardised and reduced targets, from the statistics of real embeddings' kind."""

import numpy as np
import pytest
import torch

from cmkt.errors import CmktError
from cmkt.linguistic.statistics import Gaussian, Moments, read_statistics
from cmkt.transfer import CrossModalTransfer, Targets


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Vectors as BERT-like models give them: a large common part, one dominant dimension."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((6000, 12)) @ generator.standard_normal((12, 12))
    rows += 30 * generator.standard_normal(12)
    rows[:, 3] *= 50
    rows[:, 7] = 2.0  # never changes
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def statistics(rows):
    moments = Moments()
    for start in range(0, len(rows), 17):
        moments.add(rows[start : start + 17])
    mean, covariance = moments.mean_and_covariance()
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(covariance, dtype=torch.float32)


def test_moments_in_pieces_are_those_of_all_rows(rows, statistics):
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(statistics[0], wide.mean(0), rtol=1e-5)
    scale = wide.std(0) + 1e-3
    expected = np.cov(wide.T, bias=True) / np.outer(scale, scale)
    found = statistics[1].numpy() / np.outer(scale, scale)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_statistics_survive_the_file_and_a_wrong_file_is_named(tmp_path, rows):
    moments = Moments()
    moments.add(rows)
    moments.save(tmp_path / "statistics.npz")
    mean, covariance = read_statistics(tmp_path / "statistics.npz")
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-4)
    assert covariance.shape == (12, 12)
    (tmp_path / "statistics.npz").write_bytes(b"PK but cut")
    with pytest.raises(CmktError, match="statistics.npz.*stage 3"):
        read_statistics(tmp_path / "statistics.npz")


def test_standardised_targets_have_mean_0_and_variance_1_and_spread_directions(rows, statistics):
    targets = Targets(12, standardise=True)
    targets.set_statistics(*statistics)
    text = torch.from_numpy(rows)
    standard = targets(text)
    changing = [n for n in range(12) if n != 7]
    torch.testing.assert_close(standard.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std(0)[changing], torch.ones(11), atol=1e-3, rtol=0)
    assert standard[:, 7].abs().max() == 0

    def mean_cosine(x):
        return torch.cosine_similarity(x[:-1], x[1:]).mean().item()

    assert mean_cosine(text) > 0.5 and abs(mean_cosine(standard)) < 0.05


@pytest.mark.parametrize("standardise", [True, False])
def test_all_principal_components_keep_every_angle_and_few_keep_the_largest(
    rows, statistics, standardise
):
    plain, full, few = (Targets(12, standardise, pca) for pca in (None, 12, 3))
    for targets in (plain, full, few):
        if targets.needs_statistics:
            targets.set_statistics(*statistics)
    text = torch.from_numpy(rows)[None]
    centred = plain(text) if standardise else text - statistics[0]
    angles = torch.cosine_similarity(centred[0, :-1], centred[0, 1:])
    rotated = full(text)
    found = torch.cosine_similarity(rotated[0, :-1], rotated[0, 1:])
    torch.testing.assert_close(found, angles, atol=1e-3, rtol=0)
    assert few(text).shape == (1, 6000, 3)
    torch.testing.assert_close(few(text), rotated[..., :3], atol=1e-2, rtol=1e-3)
    variances = rotated[0].var(0)
    assert (variances[:-1] >= variances[1:] - 1e-3).all()


def test_standardised_transfer_masks_missing_text_and_keeps_the_state(statistics):
    torch.manual_seed(0)
    transfer = CrossModalTransfer(5, 12, standardise=True, pca=4)
    transfer.targets.set_statistics(*statistics)
    acoustic, frames = torch.randn(3, 20, 5), torch.tensor([20, 18, 15])
    text, tokens = torch.randn(3, 4, 12), torch.tensor([4, 3, 1])
    text[2] = 0  # no transcript
    loss = transfer(acoustic, frames, text, tokens)
    torch.testing.assert_close(loss, transfer(acoustic[:2], frames[:2], text[:2], tokens[:2]))
    other = CrossModalTransfer(5, 12, standardise=True, pca=4)
    other.load_state_dict(transfer.state_dict())
    torch.testing.assert_close(other(acoustic, frames, text, tokens), loss)


@pytest.mark.parametrize("conf", [{"standardise": 1}, {"pca": 0}, {"pca": 13}, {"pca": True}])
def test_wrong_values_are_named(conf):
    with pytest.raises(ValueError, match=next(iter(conf))):
        CrossModalTransfer(5, 12, **conf)


def test_gaussian_has_the_statistics_it_was_given(rows, statistics):
    drawn = Gaussian(*map(np.asarray, statistics)).draw(20000, np.random.default_rng(0))
    deviation = rows.std(0) + 1e-6
    assert drawn.dtype == np.float32 and drawn.shape == (20000, 12)
    np.testing.assert_allclose((drawn.mean(0) - rows.mean(0)) / deviation, 0, atol=0.05)
    correlation = np.corrcoef(drawn[:, [0, 1, 3]].T)
    np.testing.assert_allclose(correlation, np.corrcoef(rows[:, [0, 1, 3]].T), atol=0.05)
