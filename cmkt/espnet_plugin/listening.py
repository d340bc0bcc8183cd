"""Listening at taps: hooks, what building a model finds out about a tap, and pooling."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch

from cmkt.errors import CmktError
from cmkt.espnet_plugin.layouts import find_layout, fits, tensors_of, to_frames
from cmkt.espnet_plugin.taps import Tap, nearest
from cmkt.transfer.sequences import lengths_to_mask
from cmkt.transfer.settings import build_part, number, whole

# Two signals show which axis is what: batch size and length differ, by different factors.
BATCHES, SAMPLES = (2, 3), (3840, 11520)
# Two signals that show the hop of an encoder; most hops divide their difference.
LONG = (8000, 8000 + 76800)


@dataclass(frozen=True)
class Pooling:
    """How much of a wide or fast activation the alignment is given.

    Args:
        frames_per_second: above it, as many frames as needed are averaged; None: never.
        width: with more numbers than this in a frame, neighbouring bands of a layout with
            frequency are averaged, down to one band at the least; None: never.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    frames_per_second: float | None = 125
    width: int | None = 512

    def __post_init__(self):
        if self.frames_per_second is not None:
            number("pooling.frames_per_second", self.frames_per_second, 0, above=True)
        if self.width is not None:
            whole("pooling.width", self.width, 1)


@dataclass(frozen=True)
class Listener:
    """A tap with what was found out about it when the model was built.

    Args:
        tap: with its layout.
        channels: of a frame.
        bands: of each channel, after pooling.
        rate: frames per second at the tap.
        step: so many frames are averaged.
    """

    tap: Tap
    channels: int
    bands: int
    rate: float
    step: int

    @property
    def width(self) -> int:
        """D_a, of the acoustic sequence."""
        return self.channels * self.bands

    @property
    def frames_per_second(self) -> float:
        """Of the acoustic sequence."""
        return self.rate / self.step


@dataclass
class Heard:
    """What one forward pass left at the taps."""

    values: dict[Tap, object] = field(default_factory=dict)  # as they stood there
    lengths: torch.Tensor | None = None  # (B,) valid frames of the separator's input
    frames: int = 0  # of the separator's input
    before_segments: dict[str, int] = field(default_factory=dict)  # frames that were cut

    def stream(self, listeners: Iterable[Listener]) -> list[torch.Tensor]:
        """Return the tensors that stood at some taps, on which the enhancement depends."""
        return [part for one in listeners for part in tensors_of(self.values[one.tap])]

    def frames_at(self, tap: Tap) -> torch.Tensor:
        """Return what was heard at a tap, not pooled: (B, T, C, F)."""
        frames = self.before_segments.get(tap.frames, self.frames)
        parts = [
            to_frames(part, tap.layout, len(self.lengths), frames, tap.lead)
            for part in tensors_of(self.values[tap])
        ]
        return torch.cat(parts, 2)

    def sequence(self, listeners: Sequence[Listener]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what was heard at some taps, pooled and side by side.

        Returns:
            acoustic (B, T_a, sum of the widths) and its valid frames (B,).
        """
        parts, lengths = [], self.lengths
        for one in listeners:
            x = pool_bands(self.frames_at(one.tap), one.bands).flatten(2)  # (B, T, D)
            lengths = self.lengths
            if x.shape[1] != self.frames:  # rounded up
                lengths = -(-lengths * x.shape[1] // self.frames)
            x, lengths = pool_time(x, lengths, one.step)
            parts.append(x)
        if len(parts) == 1:
            return parts[0], lengths
        shortest = min(x.shape[1] for x in parts)
        parts = [x[:, :shortest] for x in parts]
        return torch.cat(parts, -1), lengths.clamp(max=shortest)


def pool_bands(x: torch.Tensor, bands: int) -> torch.Tensor:
    """Average neighbouring bands.

    Args:
        x: (B, T, C, F).
        bands: how many are left.

    Returns:
        (B, T, C, bands).
    """
    if bands == x.shape[-1]:
        return x
    # As a product: torch's own pooling has no reproducible gradient on a GPU.
    identity = torch.eye(x.shape[-1], dtype=torch.float32, device=x.device)
    return x @ torch.nn.functional.adaptive_avg_pool1d(identity, bands).to(x.dtype)


def pool_time(
    x: torch.Tensor, lengths: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average every `step` frames, of which only valid ones count.

    Args:
        x: (B, T, D).
        lengths: (B,) valid frames.
        step: at least 1.

    Returns:
        (B, ceil(T / step), D) and its valid frames, ceil(lengths / step).
    """
    if step == 1:
        return x, lengths
    mask = lengths_to_mask(lengths.to(x.device), x.shape[1])[..., None]  # (B, T, 1)
    missing = -x.shape[1] % step
    x = x.masked_fill(~mask, 0)
    x, mask = (torch.nn.functional.pad(y, (0, 0, 0, missing)) for y in (x, mask))
    total = x.unflatten(1, (-1, step)).sum(2)
    count = mask.unflatten(1, (-1, step)).sum(2).clamp(min=1)  # (B, T_a, 1)
    return total / count, -(-lengths // step)


@contextmanager
def listen(separator: torch.nn.Module, listeners: Iterable[Listener]) -> Iterator[Heard]:
    """Listen at some taps while the block runs; the hooks are gone afterwards.

    Args:
        separator: called inside the block as `separator(input, ilens, ...)`.
        listeners: where to listen. Of a module that runs several times, the last time counts.

    Returns:
        a `Heard` that the forward pass fills.
    """
    with _record(separator, [one.tap for one in listeners]) as heard:
        yield heard


@contextmanager
def _record(separator: torch.nn.Module, taps: Iterable[Tap]) -> Iterator[Heard]:
    heard = Heard()

    def keep_lengths(_, inputs):
        heard.frames, heard.lengths = inputs[0].shape[1], inputs[1]

    def keep(tap, value):
        heard.values[tap] = value

    def count(path, value):
        heard.before_segments[path] = value.shape[-1]

    with ExitStack() as hooks:
        handles = [separator.register_forward_pre_hook(keep_lengths)]
        for path in {tap.frames for tap in taps if tap.frames}:
            module = separator.get_submodule(path)
            hook = module.register_forward_hook(lambda _, x, y, path=path: count(path, y))
            handles.append(hook)
        for tap in set(taps):
            module = separator.get_submodule(tap.module)
            if tap.side == "input":
                hook = module.register_forward_pre_hook(lambda _, x, tap=tap: keep(tap, x))
            else:
                hook = module.register_forward_hook(lambda _, x, y, tap=tap: keep(tap, y))
            handles.append(hook)
        for handle in handles:
            hooks.callback(handle.remove)
        yield heard


def _probe(encoder: torch.nn.Module, separator: torch.nn.Module, taps: Sequence[Tap]):
    """Pass two short signals through, and return what each left.

    It is noise, since some separators divide by its level, from a generator of its own. What a
    separator draws (layers to leave out, even in evaluation) is put back, so that a model built
    with a tap starts from the same weights as one without. Only the first has gradients.
    """
    training = separator.training
    separator.eval()
    generator = torch.Generator().manual_seed(0)
    passes = []
    for batch, samples, graph in zip(BATCHES, SAMPLES, (True, False), strict=True):
        speech = 0.1 * torch.randn(batch, samples, generator=generator)
        with (
            torch.random.fork_rng(devices=[]),
            torch.set_grad_enabled(graph),
            _record(separator, taps) as heard,
        ):
            separator(*encoder(speech, torch.full((batch,), samples)), {})
        passes.append(heard)
    separator.train(training)
    return passes


def find_layouts(
    encoder: torch.nn.Module, separator: torch.nn.Module, taps: Sequence[Tap]
) -> tuple[list[Tap], list[Heard]]:
    """Find the open layouts of taps, and check those that are given.

    Args:
        encoder: of the enhancement model, on the CPU.
        separator: left as it is.
        taps: of this separator.

    Returns:
        the taps with their layouts, each once; what two short signals left there.

    Raises:
        CmktError: a module that is not called, a layout that does not fit, an activation
            without a time axis, or one with nothing to train below it.
    """
    passes = _probe(encoder, separator, taps)
    found = []
    for tap in taps:
        shapes = _shapes(passes, tap)
        layout = tap.layout or (find_layout(*shapes, BATCHES) if shapes else None)
        if layout is None:
            raise _no_time_axis(encoder, separator, tap, shapes)
        if not shapes or not fits(layout, *shapes, BATCHES):
            raise CmktError(
                f"transfer_conf.tap: {tap} is not {layout}: {_as_text(shapes)}",
                remedy="leave `layout` out, and it is found",
            )
        if not any(part.requires_grad for part in tensors_of(passes[0].values[tap])):
            raise CmktError(
                f"transfer_conf.tap: nothing that is trained lies before the {tap}",
                remedy="take a tap after the first layers",
            )
        found.append(replace(tap, layout=layout))
    for heard in passes:
        heard.values = {new: heard.values[old] for new, old in zip(found, taps, strict=True)}
    return list(dict.fromkeys(found)), passes


def _shapes(passes: Sequence[Heard], tap: Tap) -> list[tuple[int, ...]]:
    """Return the shapes at a tap for both signals; none if there is no tensor."""
    values = [tensors_of(heard.values.get(tap)) for heard in passes]
    return [tuple(parts[0].shape) for parts in values] if all(values) else []


def _as_text(shapes: Sequence[tuple[int, ...]]) -> str:
    if not shapes:
        return "no tensor passes there"
    batches = " and ".join(f"{batch} signals" for batch in BATCHES)
    return f"its shapes for {batches}, the second three times as long, are {shapes[0]}, {shapes[1]}"


def _no_time_axis(encoder, separator, tap: Tap, shapes) -> CmktError:
    """Name the modules like this one that do have a time axis."""
    every = [Tap(path) for path, _ in separator.named_modules() if path]
    passes = _probe(encoder, separator, every)
    good = []
    for other in every:
        of_other = _shapes(passes, other)
        if of_other and find_layout(*of_other, BATCHES):
            good.append(other.module)
    return CmktError(
        f"transfer_conf.tap: {tap} has no time axis: {_as_text(shapes)}",
        remedy="give its `layout` (docs/new_backbone.md), or use a module that has one, as "
        + ", ".join(nearest(tap.module, good)),
    )


def find_listeners(
    encoder: torch.nn.Module,
    separator: torch.nn.Module,
    taps: Sequence[Tap],
    pooling: dict | None,
    sample_rate: int,
) -> list[Listener]:
    """Find what a transfer needs to know about its taps, by passing two short signals through.

    Args:
        encoder: of the enhancement model, on the CPU.
        separator: left as it is.
        taps: of this separator.
        pooling: arguments of `Pooling`.
        sample_rate: in Hz.

    Raises:
        CmktError: see `find_layouts`; or taps that differ in their numbers of frames.
        ValueError: wrong settings of the pooling.
    """
    pooling = build_part(Pooling, "pooling", pooling)
    taps, passes = find_layouts(encoder, separator, taps)
    listeners, counts = [], set()
    for tap in taps:
        short, long = (heard.frames_at(tap).shape for heard in passes)
        inputs = [heard.frames for heard in passes]
        if [short[1], long[1]] == inputs:
            hop = _hop(encoder)
        else:
            hop = (SAMPLES[1] - SAMPLES[0]) / (long[1] - short[1])
        rate, step = sample_rate / hop, 1
        if pooling.frames_per_second is not None:
            step = max(1, math.ceil(rate / pooling.frames_per_second - 1e-6))
        channels, bands = short[2:]
        if pooling.width is not None and channels * bands > pooling.width:
            bands = max(1, pooling.width // channels)
        listeners.append(Listener(tap, channels, bands, rate, step))
        counts.add(tuple(-(-shape[1] // step) for shape in (short, long)))
    if len(counts) > 1:
        raise CmktError(
            "transfer_conf.tap: the taps differ in their numbers of frames",
            remedy="use one of them, or average with transfer_conf.pooling.frames_per_second",
        )
    return listeners


@torch.no_grad()
def _hop(encoder: torch.nn.Module) -> float:
    """Return the samples from one frame of an encoder to the next."""
    frames = [encoder(torch.zeros(1, n), torch.tensor([n]))[0].shape[1] for n in LONG]
    return (LONG[1] - LONG[0]) / (frames[1] - frames[0])
