"""espeak-ng through ctypes: text to samples and word times, the same on every run."""

import ctypes
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soxr

from cmkt.corpus.word_times import Word
from cmkt.errors import CmktError

RATE = 16000
ESPEAK_RATE = 22050
SYNCHRONOUS, UTF8 = 2, 1
# Numbers of espeak_SetParameter.
SPEED, VOLUME, PITCH, RANGE = 1, 2, 3, 4
# At the default volume, 100, some variants saturate within espeak-ng.
QUIET = 30
LAST_EVENT, WORD_EVENT = 0, 1  # types of espeak_EVENT


class Event(ctypes.Structure):
    """espeak_EVENT: something that happens within the samples of one callback."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1 on
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds from the beginning
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
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
    """Speak, as `synthesise_words`, and return the samples alone."""
    return synthesise_words(text, voice)[0]


def synthesise_words(text: str, voice: Voice) -> tuple[np.ndarray, list[Word]]:
    """Speak.

    espeak-ng keeps state from one sentence to the next, and nothing resets all of it, so each
    call speaks in a child process of its own.

    Args:
        text: plain words.
        voice: who says them.

    Returns:
        samples (N,) float32 at 16 kHz, of any level, not clipped; the words and when they are
        said. A word ends where the next one begins: a pause belongs to the word before it.

    Raises:
        CmktError: no such voice, or espeak-ng fails.
    """
    import espeakng_loader

    library, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    raw = _in_child(lambda: _speak(library, data, text, voice))
    if not raw:
        raise CmktError(f"espeak-ng cannot say {text!r} with the voice {voice.voice}")
    head, _, raw = raw.partition(b"\n")
    samples = np.frombuffer(raw, np.int16).astype(np.float32) / 32768
    samples = soxr.resample(samples, ESPEAK_RATE, RATE).astype(np.float32)
    return samples, _words(text, json.loads(head), len(samples) / RATE)


def _words(text: str, events: list[tuple[int, int]], seconds: float) -> list[Word]:
    """Turn word events (character, milliseconds) into words.

    A word is all that stands before the next one: of some Mandarin words the event's own length
    is that of the first character.
    """
    places = [at - 1 for at, _ in events]
    starts = [min(ms / 1000, seconds) for _, ms in events]
    pieces = [text[a:b] for a, b in zip(places, [*places[1:], len(text)], strict=True)]
    spoken = ["".join(piece.split()) for piece in pieces]
    return list(map(Word, spoken, starts, [*starts[1:], seconds]))


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
    """Return the word events in a line and 16-bit samples at 22.05 kHz; empty if refused."""
    library = ctypes.CDLL(library_path)
    if library.espeak_Initialize(SYNCHRONOUS, 0, data_path.encode(), 0) != ESPEAK_RATE:
        return b""
    ctypes.CDLL(None).srand(1)  # the breath of some voices comes from the C library's rand()
    pieces, spoken = [], []

    @CALLBACK
    def receive(samples, count, events):
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        number = 0
        while events and events[number].type != LAST_EVENT:
            event = events[number]
            if event.type == WORD_EVENT:
                spoken.append((event.text_position, event.audio_position))
            number += 1
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
    return json.dumps(spoken).encode() + b"\n" + b"".join(pieces) if pieces else b""
