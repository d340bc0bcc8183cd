"""The figures of the report, written as PNG."""

import warnings
from pathlib import Path

import numpy as np

from cmkt.evaluate.history import History
from cmkt.stage import atomic_file

# Matplotlib's own font has no Chinese; the first of these that is installed helps out.
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
                 "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "SimHei")  # fmt: skip


def _figure(columns: int, width: float, height: float):
    # Figures of their own, not pyplot's, need no display and no closing.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    chinese = [name for name in CHINESE_FONTS if name in installed]
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *chinese[:1]]
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure, path: Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "wb") as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # boxes tell it well enough
        # No version of matplotlib in the file: the same numbers give the same bytes.
        figure.savefig(stream, format="png", dpi=100, metadata={"Software": None})


def training_curves(histories: dict[str, History], path: str | Path) -> None:
    """Plot enhancement loss (training dashed, validation solid) and transfer gap by epoch.

    Args:
        histories: by experiment tag.
        path: PNG to write; its folder is made.
    """
    figure, (loss_axis, gap_axis) = _figure(2, 11, 4)
    for index, (tag, history) in enumerate(histories.items()):
        color = f"C{index % 10}"
        for part, style, label in (("train", "--", None), ("valid", "-", tag)):
            table = getattr(history, part)
            values = table.get("loss_se", table.get("loss"))
            if values is not None:
                loss_axis.plot(history.epochs, _floats(values), style, color=color, label=label)
        if "transfer_gap" in history.valid:
            gap = _floats(history.valid["transfer_gap"])
            gap_axis.plot(history.epochs, gap, "o-", markersize=3, color=color, label=tag)
    gap_axis.axhline(0, color="grey", linewidth=0.8)
    loss_axis.set_title("enhancement loss (dashed: training, solid: validation)")
    gap_axis.set_title("transfer gap (validation)")
    for axis in (loss_axis, gap_axis):
        axis.set_xlabel("epoch")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    _save(figure, path)


def _floats(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def attention_map(
    weights: np.ndarray, tokens: list[str], duration: float, path: str | Path
) -> None:
    """Plot which acoustic frames each text token attends to.

    Args:
        weights: attention (T_t tokens, T_a frames).
        tokens: T_t labels.
        duration: length of the utterance in seconds.
        path: PNG to write; its folder is made.

    Raises:
        ValueError: not one label per row.
    """
    weights = np.asarray(weights)
    if weights.ndim != 2 or len(weights) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens for attention weights of shape {weights.shape}")
    figure, (axis,) = _figure(1, 8, 1.5 + 0.22 * len(tokens))
    image = axis.imshow(
        weights,
        aspect="auto",
        interpolation="nearest",
        extent=(0, duration, len(tokens) - 0.5, -0.5),
    )
    # A dollar sign in a transcript is not the start of a formula.
    labels = [token.replace("$", r"\$") for token in tokens]
    axis.set_yticks(range(len(tokens)), labels)
    axis.set_xlabel("time (s)")
    figure.colorbar(image, ax=axis, label="attention weight")
    _save(figure, path)
