"""espeak-ng through ctypes: text to samples, the same samples on every run."""

import ctypes
import ctypes.util
from dataclasses import dataclass

import numpy as np
import soxr

from cmkt.errors import CmktError

RATE = 16000
ESPEAK_RATE = 22050
SYNCHRONOUS, UTF8 = 2, 1
PARAMETER_RATE, PARAMETER_PITCH, PARAMETER_RANGE = 1, 3, 4
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """A speaker: espeak-ng voice and variant, words per minute, pitch (0 to 99) and its range.

    The variants f2, f3, f5 and victor are not used: in espeak-ng 1.52 they read uninitialised
    memory, so their samples differ from process to process.
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
            "the synthesiser espeakng-loader is not installed",
            remedy="pip install '.[mini]' in the repository",
        ) from error


def synthesise(text: str, voice: Voice) -> np.ndarray:
    """Speak.

    espeak-ng keeps state from one sentence to the next, so this is called once per process: a
    worker that has spoken is thrown away (`maxtasksperchild=1`).

    Args:
        text: plain words.
        voice: who says them.

    Returns:
        samples (N,) float32 at 16 kHz.
    """
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate != ESPEAK_RATE:
        raise CmktError(f"espeak-ng does not start (it answers {rate})")
    ctypes.CDLL(None).srand(1)  # the breath of some voices comes from the C library's rand()
    pieces = []

    @CALLBACK
    def receive(samples, count, _):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    if library.espeak_SetVoiceByName(voice.voice.encode()) != 0:
        raise CmktError(f"espeak-ng has no voice {voice.voice}")
    for parameter, value in (
        (PARAMETER_RATE, voice.rate),
        (PARAMETER_PITCH, voice.pitch),
        (PARAMETER_RANGE, voice.range),
    ):
        library.espeak_SetParameter(parameter, value, 0)
    words = text.encode()
    library.espeak_Synth(words, len(words) + 1, 0, 0, 0, UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(pieces).astype(np.float32) / 32768
    return soxr.resample(samples, ESPEAK_RATE, RATE).astype(np.float32)
