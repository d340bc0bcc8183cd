"""Draw the pictures of docs/misalignment.md: `python docs/misalignment.py` (into docs/img).

Every picture is made by the real `Misalignment` on one sentence of six words, three frames a word.
"""

from pathlib import Path

import numpy
import torch
from matplotlib import pyplot
from PIL import Image

from cmkt.transfer import Misalignment

pyplot.switch_backend("agg")
IMAGES = Path(__file__).parent / "img"
WORDS = ("the", "cat", "sat", "on", "a", "mat")
COLOURS = [pyplot.get_cmap("tab10")(number) for number in range(6)]
GREY = (0.85, 0.85, 0.85, 1)
IDS = torch.arange(6)[None]
SEED = 149  # of draws that differ


def move(progress: float = 0.0, copies: int = 1, **conf):
    """Misalign the sentence; numbers stand for embeddings and frames."""
    torch.manual_seed(SEED)
    ids = IDS.expand(copies, 6)
    text, tokens = ids[..., None].float(), torch.full((copies,), 6)
    acoustic = text.repeat_interleave(3, 1)
    return Misalignment(**conf)(acoustic, 3 * tokens, text, tokens, ids, progress)


def boxes(axes, row: float, numbers, width: float = 1.0, valid=None) -> None:
    """Draw one box for each number; one that takes no part is grey and has no word."""
    for place, number in enumerate(numbers):
        counts = valid is None or bool(valid[place])
        colour = COLOURS[number] if counts else GREY
        axes.barh(row, width, 0.8, place * width, color=colour, edgecolor="white", linewidth=0.8)
        if width == 1 and counts:
            axes.text(place + 0.5, row, WORDS[number], ha="center", va="center", color="white")


def panel(axes, title: str, rows: list[str]) -> None:
    """Name the rows of a panel, the first at the top."""
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(0, 6)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def sentence(axes, title: str, **conf) -> None:
    """Draw what is heard, what the alignment is asked for and what its answer is compared with."""
    moved = move(**conf)
    panel(axes, title, ["frames", "query", "target"])
    boxes(axes, 0, moved.acoustic[0, :, 0].int(), 1 / 3)
    boxes(axes, 1, moved.query_ids[0])
    boxes(axes, 2, moved.target_ids[0], valid=moved.valid[0])


def several(axes, title: str, row_names, draws) -> None:
    """Draw the targets of several draws."""
    panel(axes, title, row_names)
    for row, moved in enumerate(draws):
        boxes(axes, row, moved.target_ids[0], valid=moved.valid[0])


def save(name: str, count: int, height: float):
    """Yield the axes of `count` panels, then write the picture."""
    figure, axes = pyplot.subplots(1, count, figsize=(3.1 * count, height), dpi=72, squeeze=False)
    yield from axes[0]
    figure.tight_layout()
    figure.canvas.draw()
    pixels = Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    # 48 colours make a third of the size.
    pixels.quantize(48, dither=Image.Dither.NONE).save(
        IMAGES / f"misalignment_{name}.png", optimize=True
    )
    pyplot.close(figure)
    yield None


def draw_all() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    pyplot.rcParams.update({"font.size": 8})

    panels = save("mode", 3, 1.5)
    sentence(next(panels), "mode: off", mode="off")
    sentence(next(panels), "mode: fixed, maximum: 1", mode="fixed", maximum=1)
    sentence(next(panels), "mode: shuffle", mode="shuffle")
    next(panels)

    panels = save("side", 3, 1.5)
    sentence(next(panels), "side: targets", mode="fixed")
    sentence(next(panels), "side: queries", mode="fixed", side="queries")
    sentence(next(panels), "unit: frame (side: acoustic)", mode="fixed", unit="frame", maximum=2)
    next(panels)

    panels = save("edges", 3, 1.5)
    for edges in ("pad", "wrap", "clip"):
        sentence(next(panels), f"edges: {edges}, maximum: 2", mode="fixed", maximum=2, edges=edges)
    next(panels)

    panels = save("maximum", 2, 1.5)
    for title, conf in (
        ("mode: random, maximum: 1", {"maximum": 1}),
        ("mode: random, maximum_share: 0.5", {"maximum_share": 0.5}),
    ):
        moved = move(copies=4, mode="random", **conf)
        draws = [moved._replace(target_ids=moved.target_ids[n : n + 1]) for n in range(4)]
        several(next(panels), title, [f"draw {n + 1}" for n in range(4)], draws)
    next(panels)

    panels = save("per", 2, 1.5)
    for per in ("utterance", "batch"):
        moved = move(copies=3, mode="random", maximum=2, per=per)
        draws = [moved._replace(target_ids=moved.target_ids[n : n + 1]) for n in range(3)]
        several(next(panels), f"per: {per}", [f"utterance {n + 1}" for n in range(3)], draws)
    next(panels)

    panels = save("curriculum", 2, 2.0)
    for direction in ("shrinking", "growing"):
        axes = next(panels)
        shifter = Misalignment("curriculum", maximum=4, until=0.6, direction=direction)
        for progress in torch.linspace(0, 1, 41).tolist():
            by = shifter.draw(torch.full((200,), 30), progress)
            axes.plot([progress] * len(by), by, ".", color=COLOURS[0], markersize=3)
        axes.set_title(f"direction: {direction}, until: 0.6", loc="left", fontsize=9)
        axes.set_xlabel("share of the training")
        axes.set_ylabel("shift k")
        axes.set_yticks([-4, 0, 4])
    next(panels)


if __name__ == "__main__":
    draw_all()
