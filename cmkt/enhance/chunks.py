"""Enhances one audio file of any length, rate and channel count in bounded memory."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cmkt.errors import CmktError

SEGMENT_SECONDS = 30.0  # longer recordings are cut into segments of at most this
OVERLAP_SECONDS = 2.0  # over which neighbouring segments are cross-faded
BLOCK_SECONDS = 10.0  # read and converted at a time
FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")


def read_header(path: Path):
    """Read the header of an audio file.

    Returns:
        what `soundfile.info` returns.

    Raises:
        CmktError: missing, empty or not audio.
    """
    if not path.is_file():
        raise CmktError("no such audio file", path)
    try:
        header = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CmktError(
            f"not readable as audio: {reason}", path, remedy="replace the file or leave it out"
        ) from error
    if header.frames == 0:
        raise CmktError("empty audio file", path, remedy="replace the file or leave it out")
    return header


def enhance_file(
    enhancer, source: Path, target: Path, progress: Callable[[float], object] = lambda _: None
) -> list[str]:
    """Enhance a file; each channel by itself.

    Recordings up to `SEGMENT_SECONDS` are enhanced in one piece, so at the model's own rate the
    samples are those of ESPnet's `SeparateSpeech`. Longer ones are enhanced in overlapping
    segments of equal length that share the normalisation of the whole recording, as in
    `SeparateSpeech(segment_size=..., hop_size=...)`, and are cross-faded linearly.

    Args:
        enhancer: an `Enhancer`, or anything with its `sample_rate`, `normalises` and call.
        source: audio file of any rate.
        target: file to write, with the rate, channels and length of `source`, and its sample
            format where the target's container has it. Gets its name only when complete.
        progress: told the seconds of audio done since it was last called.

    Returns:
        remarks for the user, for example on clipping.

    Raises:
        CmktError: unreadable, truncated or not finite input.
        OSError: no space left.
    """
    header = read_header(source)
    container, subtype = _target_format(target, header)
    temporary = target.with_name(f".{target.name}.tmp")
    clipped = written = 0
    try:
        with soundfile.SoundFile(
            temporary, "w", header.samplerate, header.channels, subtype, format=container
        ) as stream:
            for block in _enhanced_blocks(enhancer, source, header):
                # The two rate conversions may give a sample more or less.
                block = block[: header.frames - written]
                progress(len(block) / header.samplerate)
                if subtype not in FLOAT_SUBTYPES:
                    clipped += int((np.abs(block) > 1).sum())
                    block = np.clip(block, -1, 1)
                stream.write(block)
                written += len(block)
            stream.write(np.zeros((header.frames - written, header.channels), np.float32))
        temporary.replace(target)
    except soundfile.LibsndfileError as error:
        # libsndfile does not say why.
        if shutil.disk_usage(target.parent).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
        raise CmktError(f"cannot be written: {error.error_string}", target) from error
    finally:
        temporary.unlink(missing_ok=True)
    if not clipped:
        return []
    return [f"{target}: {clipped} samples clipped, {subtype} cannot hold values beyond 1"]


def _target_format(target: Path, header) -> tuple[str, str]:
    container = "WAV" if target.suffix.lower() == ".wav" else header.format
    if container == "WAV" and header.format == "WAVEX":
        container = "WAVEX"
    subtype = header.subtype
    if not soundfile.check_format(container, subtype):
        subtype = "FLOAT" if soundfile.check_format(container, "FLOAT") else "PCM_16"
    return container, subtype


def _read_blocks(source: Path, header, seconds: float) -> Iterator[np.ndarray]:
    """Yield blocks (n, C) float32 of the whole file."""
    read = 0
    try:
        with soundfile.SoundFile(str(source)) as stream:
            while read < header.frames:
                block = stream.read(int(seconds * header.samplerate), "float32", always_2d=True)
                if len(block) == 0:
                    break
                if not np.isfinite(block).all():
                    raise CmktError("holds samples that are not finite", source)
                read += len(block)
                yield block
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise CmktError(f"not readable as audio: {str(error).splitlines()[0]}", source) from error
    if read < header.frames:
        raise CmktError(
            f"truncated: {read} of {header.frames} samples", source, remedy="replace the file"
        )


def _convert(blocks: Iterator[np.ndarray], rate: int, new_rate: int) -> Iterator[np.ndarray]:
    """Convert the sampling rate of a stream of blocks (n, C); equals converting it in one piece."""
    if rate == new_rate:
        yield from blocks
        return
    stream = None
    for block in blocks:
        stream = stream or soxr.ResampleStream(rate, new_rate, block.shape[1], dtype="float32")
        yield stream.resample_chunk(np.ascontiguousarray(block))
    if stream is not None:
        yield stream.resample_chunk(np.zeros((0, block.shape[1]), np.float32), last=True)


def _enhanced_blocks(enhancer, source: Path, header) -> Iterator[np.ndarray]:
    """Yield the enhanced recording in blocks (n, C) at the rate of `source`."""
    rate = enhancer.sample_rate
    if header.frames <= SEGMENT_SECONDS * header.samplerate:
        blocks = _convert(_read_blocks(source, header, SEGMENT_SECONDS), header.samplerate, rate)
        whole = np.concatenate(list(blocks))
        enhanced = iter([_enhance_channels(enhancer, whole, [None] * header.channels)])
    else:
        samples, scales = _measure(
            _convert(_read_blocks(source, header, BLOCK_SECONDS), header.samplerate, rate)
        )
        blocks = _convert(_read_blocks(source, header, BLOCK_SECONDS), header.samplerate, rate)
        enhanced = _enhance_segments(enhancer, blocks, samples, scales)
    yield from _convert(enhanced, rate, header.samplerate)


def _measure(blocks: Iterator[np.ndarray]) -> tuple[int, list[float]]:
    """Return the number of samples and the standard deviation of each channel."""
    samples, mean, squares = 0, 0.0, 0.0
    for block in blocks:
        if len(block) == 0:
            continue
        # Chan et al.'s update of mean and sum of squared deviations: exact for any block size.
        block = block.astype(np.float64)
        block_mean = block.mean(axis=0)
        shift = block_mean - mean
        total = samples + len(block)
        squares = squares + ((block - block_mean) ** 2).sum(axis=0)
        squares = squares + shift**2 * samples * len(block) / total
        mean = mean + shift * len(block) / total
        samples = total
    return samples, list(np.sqrt(squares / (samples - 1)))


def _enhance_channels(enhancer, block: np.ndarray, scales: list) -> np.ndarray:
    """Enhance each channel of a block (n, C) by itself."""
    channels = [
        enhancer(np.ascontiguousarray(channel), scale)
        for channel, scale in zip(block.T, scales, strict=True)
    ]
    return np.stack(channels, axis=1)


def _enhance_segments(
    enhancer, blocks: Iterator[np.ndarray], samples: int, scales: list
) -> Iterator[np.ndarray]:
    """Enhance overlapping segments of a stream and join them.

    Args:
        enhancer: see `enhance_file`.
        blocks: (n, C) at the model's rate.
        samples: how many they hold in all.
        scales: standard deviation of each channel over the whole recording.

    Yields:
        (n, C), `samples` in all.
    """
    overlap = int(OVERLAP_SECONDS * enhancer.sample_rate)
    longest = int(SEGMENT_SECONDS * enhancer.sample_rate)
    count = -(-(samples - overlap) // (longest - overlap))
    # Equal segments: a short last one would give the model too little context.
    length = -(-(samples + (count - 1) * overlap) // count)
    fade_in = ((np.arange(overlap, dtype=np.float32) + 0.5) / overlap)[:, None]
    pending, tail = np.zeros((0, len(scales)), np.float32), None
    for index in range(count):
        last = index == count - 1
        while last or len(pending) < length:
            block = next(blocks, None)
            if block is None:
                break
            pending = np.concatenate([pending, block])
        enhanced = _enhance_channels(enhancer, pending if last else pending[:length], scales)
        if tail is not None:
            enhanced[:overlap] = tail * (1 - fade_in) + enhanced[:overlap] * fade_in
        if last:
            yield enhanced
        else:
            tail = enhanced[-overlap:]
            yield enhanced[:-overlap]
            pending = pending[length - overlap :]
