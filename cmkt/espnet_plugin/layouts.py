"""Layouts: what each axis of a tensor inside a network is, and how the tensor becomes frames.

A layout has one letter for each axis: `B` batch, `T` frames, `F` frequency; all others, usually
`C` or `D`, are width. Axes that a network has merged stand in parentheses, the outer one first:
`(BF)TC`. Dual-path networks cut the frames into segments: `K` is the place in a segment, `S` the
number of the segment. Segments are merged by adding them up where they overlap and dividing by
their number.
"""

import re
from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import functional as F


def axes_of(layout: str) -> list[str]:
    """Return the letters of each axis.

    Args:
        layout: for example `(BF)TC`, which gives `["BF", "T", "C"]`.

    Raises:
        ValueError: it is none.
    """
    text = layout if isinstance(layout, str) else ""
    axes = [merged or single for merged, single in re.findall(r"\(([A-Z]{2})\)|([A-Z])", text)]
    letters = "".join(axes)
    counts = [letters.count(letter) for letter in "BTFKS"]
    spelt = "".join(axis if len(axis) == 1 else f"({axis})" for axis in axes)
    has_time = counts[1] == 1 or counts[3:] == [1, 1]
    merges = all("B" in axis for axis in axes if len(axis) > 1)
    if spelt != layout or counts[0] != 1 or max(counts) > 1 or not has_time or not merges:
        raise ValueError(
            f"tap.layout: {layout!r} is none; a layout has a letter for each axis, B (batch) and "
            "T (frames) among them once, for example BTD, BCTF or (BF)TC"
        )
    return axes


def tensors_of(value) -> list[torch.Tensor]:
    """Return the tensors that stand at a tap.

    Of a tuple (a result and a state, or the arguments of a module) the first element counts, of a
    list (as real and imaginary part) all do. Empty: there is no tensor.
    """
    while isinstance(value, tuple) and value:
        value = value[0]
    values = value if isinstance(value, list) else [value]
    parts = []
    for part in values:
        if torch.is_tensor(part):
            parts.append(part)
        elif hasattr(part, "real") and torch.is_tensor(part.real):  # torch_complex's ComplexTensor
            parts += [part.real, part.imag]
    return parts


def find_layout(short: Sequence[int], long: Sequence[int], batches: Sequence[int]) -> str | None:
    """Find which axes are batch and frames from the shapes for two inputs.

    Args:
        short: shape for the first input.
        long: shape for the second, which has another batch size and is longer.
        batches: the two batch sizes.

    Returns:
        a layout; None without an axis that equals the batch, or without exactly one that grows
        otherwise. Of four axes that start with batch and not time, the two others are channel and
        frequency, as convolutions have them.
    """
    if len(short) != len(long):
        return None
    sizes = list(zip(short, long, strict=True))
    if tuple(batches) not in sizes:
        return None
    batch = sizes.index(tuple(batches))
    grown = [n for n, (a, b) in enumerate(sizes) if a != b and n != batch]
    if len(grown) != 1 or sizes[grown[0]][0] > sizes[grown[0]][1]:
        return None
    letters = ["D"] * len(sizes)
    letters[batch], letters[grown[0]] = "B", "T"
    if len(sizes) == 4 and batch == 0 and grown[0] > 1:
        letters[1], letters[5 - grown[0]] = "C", "F"
    return "".join(letters)


def fits(layout: str, short: Sequence[int], long: Sequence[int], batches: Sequence[int]) -> bool:
    """Tell whether a layout can be that of two shapes; arguments as in `find_layout`."""
    axes = axes_of(layout)
    if not len(axes) == len(short) == len(long):
        return False
    for axis, *sizes in zip(axes, short, long, strict=True):
        if axis == "B" and tuple(sizes) != tuple(batches):
            return False
        if "B" in axis and any(size % batch for size, batch in zip(sizes, batches, strict=True)):
            return False
        if axis == "T" and not sizes[0] < sizes[1]:
            return False
        if "B" not in axis and axis not in "TS" and sizes[0] != sizes[1]:
            return False
    return True


def to_frames(
    value: torch.Tensor, layout: str, batch: int, frames: int = 0, lead: int = 1
) -> torch.Tensor:
    """Bring a tensor into the order batch, frames, channels, frequency.

    Args:
        value: real or complex, of any layout.
        layout: its axes.
        batch: B.
        frames: T, for layouts with segments.
        lead: half segments of padding before the first frame, for those.

    Returns:
        (B, T, C, F); F is 1 where the layout has no frequency. Real and imaginary part of a
        complex tensor stand side by side in C.
    """
    letters = ""
    for axis in axes_of(layout):
        if len(axis) > 1:
            value = value.unflatten(len(letters), [batch if x == "B" else -1 for x in axis])
        letters += axis
    if "K" in letters:
        order = [letters.index("B"), *_others(letters), letters.index("K"), letters.index("S")]
        value = value.permute(order).flatten(1, -3)  # (B, C, K, S)
        value, letters = merge_segments(value, frames, lead), "BCT"
    order = [letters.index(letter) for letter in "BT"] + _others(letters)
    if "F" in letters:
        value = value.permute(*order, letters.index("F")).flatten(2, -2)  # (B, T, C, F)
    else:
        value = value.permute(order).flatten(2)[..., None]  # (B, T, C, 1)
    return torch.cat([value.real, value.imag], 2) if value.is_complex() else value


def _others(letters: str) -> list[int]:
    return [n for n, letter in enumerate(letters) if letter not in "BTFKS"]


def merge_segments(value: torch.Tensor, frames: int, lead: int = 1) -> torch.Tensor:
    """Merge the segments of a dual-path network, overlapping by half or not at all.

    Args:
        value: (B, C, K, S).
        frames: T.
        lead: half segments of padding before the first frame, if they overlap.

    Returns:
        (B, C, T): the mean where two segments overlap.
    """
    size, count = value.shape[2:]
    # Half overlapping, they would hold each frame twice.
    apart = size * count <= frames + size
    step, start = (size, 0) if apart else (size // 2, lead * (size // 2))
    length = step * (count - 1) + size
    add = partial(F.fold, output_size=(1, length), kernel_size=(1, size), stride=(1, step))
    total = add(value.flatten(1, 2))  # (B, C, 1, length)
    number = add(torch.ones_like(value[:1, :1]).flatten(1, 2))  # (1, 1, 1, length)
    return (total / number)[:, :, 0, start : start + frames]
