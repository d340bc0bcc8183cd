"""espeak-ng through ctypes: text to samples, the same samples on every run."""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soxr

from cmkt.errors import CmktError

RATE = 16000
ESPEAK_RATE = 22050
SYNCHRONOUS, UTF8 = 2, 1
# Numbers of espeak_SetParameter.
SPEED, VOLUME, PITCH, RANGE = 1, 2, 3, 4
# At the default volume, 100, some variants saturate within espeak-ng.
QUIET = 30
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """A speaker.

    Args:
        name: speaker id.
        voice: espeak-ng accent, or accent+variant. Not the variants f2, f3, f5, victor, Alicia
            and sandro: in espeak-ng 1.52 their samples differ from process to process, as if
            from uninitialised memory. Nor those with an `echo` line: a clean target has none.
        rate: words per minute.
        pitch: 0 to 99; 50 is the variant's own.
        range: how lively the pitch is, 0 (monotone) to 99.
    """

    name: str
    voice: str
    rate: int
    pitch: int
    range: int


def require_espeak() -> None:
    """Raise CmktError when the synthesiser is not installed."""
    try:
        import espeakng_loader  # noqa: F401
    except ImportError as error:
        raise CmktError(
            "the synthesiser espeakng-loader is not installed", remedy="pip install 'cmkt[mini]'"
        ) from error


def synthesise(text: str, voice: Voice) -> np.ndarray:
    """Speak.

    espeak-ng keeps state from one sentence to the next, and nothing resets all of it, so each
    call speaks in a child process of its own.

    Args:
        text: plain words.
        voice: who says them.

    Returns:
        samples (N,) float32 at 16 kHz, of any level, not clipped.

    Raises:
        CmktError: no such voice, or espeak-ng fails.
    """
    import espeakng_loader

    library, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    raw = _in_child(lambda: _speak(library, data, text, voice))
    if not raw:
        raise CmktError(f"espeak-ng cannot say {text!r} with the voice {voice.voice}")
    samples = np.frombuffer(raw, np.int16).astype(np.float32) / 32768
    return soxr.resample(samples, ESPEAK_RATE, RATE).astype(np.float32)


def _in_child(function: Callable[[], bytes]) -> bytes:
    """Return what a function gives in a forked process; nothing if it fails there."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            result = memoryview(function())
            while result:
                result = result[os.write(writable, result) :]
            status = 0
        finally:
            os._exit(status)  # without the parent's clean-up
    os.close(writable)
    with os.fdopen(readable, "rb") as stream:
        result = stream.read()
    return result if os.waitpid(child, 0)[1] == 0 else b""


def _speak(library_path: str, data_path: str, text: str, voice: Voice) -> bytes:
    """Return 16-bit samples at 22.05 kHz; empty if espeak-ng refuses."""
    library = ctypes.CDLL(library_path)
    if library.espeak_Initialize(SYNCHRONOUS, 0, data_path.encode(), 0) != ESPEAK_RATE:
        return b""
    ctypes.CDLL(None).srand(1)  # the breath of some voices comes from the C library's rand()
    pieces = []

    @CALLBACK
    def receive(samples, count, _):
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(receive)
    if library.espeak_SetVoiceByName(voice.voice.encode()) != 0:
        return b""
    for parameter, value in (
        (SPEED, voice.rate),
        (VOLUME, QUIET),
        (PITCH, voice.pitch),
        (RANGE, voice.range),
    ):
        library.espeak_SetParameter(parameter, value, 0)
    words = text.encode()
    library.espeak_Synth(words, ctypes.c_size_t(len(words) + 1), 0, 0, 0, UTF8, None, None)
    library.espeak_Synchronize()
    return b"".join(pieces)
