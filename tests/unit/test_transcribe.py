"""`cmkt transcribe` with real pocketsphinx, and tiny random Whisper, Wav2Vec2 and ESPnet models."""

import importlib.util

import numpy as np
import pytest

needs_pocketsphinx = pytest.mark.skipif(
    importlib.util.find_spec("pocketsphinx") is None, reason="cmkt[asr] is not installed"
)
FS = 16000
SENTENCES = {
    "a1": "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
    "a2": "TURN THE LIGHTS OFF IN THE KITCHEN",
    "b1": "MY BROTHER LIVES IN A SMALL HOUSE NEAR THE RIVER",
    "b2": "THE TRAIN LEAVES AT SEVEN IN THE MORNING",
    "c1": "PLEASE OPEN THE WINDOW AND CLOSE THE DOOR",
    "c2": "WE HAVE NO TIME TO LOSE",
}


@pytest.fixture(scope="module")
def speech() -> dict[str, np.ndarray]:
    """Synthesised sentences, (N,) at 16 kHz."""
    pytest.importorskip("espeakng_loader")
    from tests.speech import synthesise

    return {key: synthesise(text) for key, text in SENTENCES.items()}
