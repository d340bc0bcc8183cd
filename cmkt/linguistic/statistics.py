"""Mean and covariance of the rows of a linguistic store."""

from pathlib import Path

import numpy as np

from cmkt.errors import CmktError
from cmkt.stage import atomic_file

BLOCK = 4096  # rows summed at once


class Moments:
    """Sums over rows, whatever their number.

    Rows are counted from a shift near their mean, so that the squares lose no digits.
    """

    def __init__(self):
        self.rows = 0
        self._waiting: list[np.ndarray] = []
        self._count = 0

    @property
    def dimension(self) -> int:
        """D, the width of a row."""
        return len(self._shift) if self.rows else self._waiting[0].shape[1]

    def add(self, matrix: np.ndarray) -> None:
        """Add rows (T, D)."""
        self._waiting.append(matrix)
        self._count += len(matrix)
        if self._count >= BLOCK:
            self._sum()

    def _sum(self) -> None:
        block = np.concatenate(self._waiting).astype(np.float64)  # (T, D)
        self._waiting, self._count = [], 0
        if not self.rows:
            self._shift = block.mean(0)
            self._first = np.zeros(block.shape[1])
            self._second = np.zeros((block.shape[1],) * 2)
        block -= self._shift
        self.rows += len(block)
        self._first += block.sum(0)
        self._second += block.T @ block

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean (D,) and the covariance (D, D) of all rows, float64."""
        if self._waiting:
            self._sum()
        first = self._first / self.rows
        return self._shift + first, self._second / self.rows - np.outer(first, first)

    def save(self, path: Path) -> None:
        """Write `mean`, `covariance` and `rows` as float32 .npz."""
        mean, covariance = self.mean_and_covariance()
        with atomic_file(path, "wb") as stream:
            np.savez(stream, mean=np.float32(mean), covariance=np.float32(covariance),
                     rows=self.rows)  # fmt: skip


def read_statistics(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the mean (D,) and the covariance (D, D) of a store, float32.

    Args:
        path: `statistics.npz` of a store.

    Raises:
        CmktError: not there, or not such a file.
    """
    remedy = "run stage 3 again: the store may come from an earlier version"
    try:
        with np.load(path) as found:
            return found["mean"], found["covariance"]
    except (OSError, ValueError, KeyError) as error:
        raise CmktError("no statistics of a linguistic store", path, remedy=remedy) from error


class Gaussian:
    """Draws rows of the same mean (D,) and covariance (D, D) as a store's."""

    def __init__(self, mean: np.ndarray, covariance: np.ndarray):
        # Not Cholesky: with few rows, or a dimension that never changes, it is singular.
        values, vectors = np.linalg.eigh(np.float64(covariance))
        self.mean, self.root = mean, (vectors * np.sqrt(values.clip(min=0))).T

    def draw(self, rows: int, generator: np.random.Generator) -> np.ndarray:
        """Return float32 (rows, D)."""
        return np.float32(self.mean + generator.standard_normal((rows, len(self.mean))) @ self.root)
