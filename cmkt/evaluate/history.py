"""What ESPnet reported during a training, read from the experiment's checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class History:
    """Losses and diagnostics of one training by epoch.

    Args:
        epochs: epoch numbers.
        train: {name: one value per epoch, None where the epoch has none} on the training set.
        valid: the same on the validation set.
        seconds: time spent in training and validation.
    """

    epochs: list[int]
    train: dict[str, list[float | None]] = field(default_factory=dict)
    valid: dict[str, list[float | None]] = field(default_factory=dict)
    seconds: float = 0.0

    def last(self, name: str) -> float | None:
        """The last epoch's value on the validation set; None if it was not reported."""
        return self.valid[name][-1] if name in self.valid else None


def read_history(exp_dir: Path) -> History | None:
    """Read `checkpoint.pth`, which holds the state of `espnet2.train.reporter.Reporter`.

    Args:
        exp_dir: ESPnet experiment folder.

    Returns:
        the history; None if there is no checkpoint or no finished epoch in it.
    """
    path = exp_dir / "checkpoint.pth"
    if not path.exists():
        return None
    import torch

    # The checkpoint is this user's own, and ESPnet 202511 pickles datetime.timedelta in it.
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    stats = state.get("reporter", {}).get("stats", {})
    epochs = sorted(epoch for epoch, parts in stats.items() if "valid" in parts)
    if not epochs:
        return None
    history = History(epochs)
    for part in ("train", "valid"):
        reports = [stats[epoch].get(part, {}) for epoch in epochs]
        names = sorted({name for report in reports for name in report} - {"time", "total_count"})
        table = {name: [float(r[name]) if name in r else None for r in reports] for name in names}
        setattr(history, part, table)
        history.seconds += sum(_seconds(report.get("time", 0)) for report in reports)
    return history


def _seconds(time) -> float:
    """Convert a reported time: a timedelta, or what ESPnet 202611 stores in its place."""
    if isinstance(time, dict):
        return time["__timedelta_seconds__"]
    return time.total_seconds() if hasattr(time, "total_seconds") else float(time)
