"""On-the-fly mixing: ESPnet's preprocessor, drawn from (seed, epoch, utterance) alone.

ESPnet's `EnhPreprocessor` adds noise and rooms, sets the level and distorts, from the global random
generators, so its mixtures depend on the number of workers and on where a training was resumed.
Here the generators are seeded for each utterance and put back afterwards. Added are what ESPnet
lacks: a change of speed of the clean speech, and a codec among the distortions.
"""

import inspect
import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.layers.augmentation import effects_dict
from espnet2.train.preprocessor import EnhPreprocessor

from cmkt.errors import CmktError
from cmkt.settings import read_mapping

#: Codecs of the effect `codec`: what libsndfile is told to write. Telephone codecs run at 8 kHz.
CODECS = {
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "gsm": {"format": "WAV", "subtype": "GSM610"},
    "mulaw": {"format": "WAV", "subtype": "ULAW"},
    "alaw": {"format": "WAV", "subtype": "ALAW"},
}
TELEPHONE = ("gsm", "mulaw", "alaw")
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)  # Hz


def codec(waveform: torch.Tensor, sample_rate: int, name: str) -> torch.Tensor:
    """Encode and decode; ESPnet's own effect `codecs` is not implemented.

    Args:
        waveform: (N,) samples.
        sample_rate: in Hz.
        name: a key of `CODECS`.

    Returns:
        (N,) samples, aligned with the input as far as the codec itself is.
    """
    rate = 8000 if name in TELEPHONE else sample_rate
    if name == "opus" and rate not in OPUS_RATES:
        rate = 48000
    samples = soxr.resample(waveform.numpy(), sample_rate, rate)
    peak = max(np.abs(samples).max(), 1e-9)
    encoded = io.BytesIO()
    soundfile.write(encoded, 0.9 * samples / peak, rate, **CODECS[name])
    encoded.seek(0)
    decoded, _ = soundfile.read(encoded, dtype="float32")
    decoded = soxr.resample(decoded * peak / 0.9, rate, sample_rate)[: len(waveform)]
    decoded = np.pad(decoded, (0, len(waveform) - len(decoded)))
    return torch.from_numpy(decoded).to(waveform.dtype)


effects_dict["codec"] = codec


@contextmanager
def seeded(*names: object) -> Iterator[None]:
    """Seed the global random generators from names, and put them back at the end."""
    digest = sha256(" ".join(map(str, names)).encode()).digest()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int.from_bytes(digest[:4], "big")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class OnlineMixing(EnhPreprocessor):
    """ESPnet's preprocessor with reproducible draws and a change of speed.

    Args:
        seed: with the epoch and the utterance, all that a mixture depends on.
        speed: factors, of which one is drawn for each utterance; pitch changes as well.
        settings: of `EnhPreprocessor`.

    `epoch` is set before each epoch by the iterator factory of the task.
    """

    def __init__(self, seed: int, speed: list[float] = (1.0,), **settings):
        super().__init__(train=True, **settings)
        self.seed, self.speed, self.epoch = seed, list(speed), 0
        # `np.random.choice` would turn a list of 60 000 names into an array at every draw.
        self.noises = np.array(self.noises)
        self.rirs = None if self.rirs is None else np.array(self.rirs)

    def __call__(self, uid: str, data: dict) -> dict:
        """Mix one utterance: `speech_mix` and `speech_ref1` come in clean, (N,)."""
        with seeded(self.seed, self.epoch, uid):
            factor = self.speed[np.random.randint(len(self.speed))]
            if factor != 1.0:
                changed = soxr.resample(data["speech_ref1"], factor * self.fs, self.fs)
                data["speech_ref1"] = data["speech_mix"] = changed
            return super().__call__(uid, data)


def read_mixing_config(path: Path) -> dict:
    """Read a YAML of on-the-fly mixing, such as conf/mixing/noise.yaml.

    Returns:
        settings of `OnlineMixing` but for the lists of files, the rate and the seed.

    Raises:
        CmktError: a missing file, no mapping, or a key that ESPnet's preprocessor does not have.
    """
    conf = read_mapping(path, "mixing configuration", "see conf/mixing/")
    if not conf:
        raise CmktError("no settings", path, remedy="see conf/mixing/")
    taken = {"self", "train", "noise_scp", "rir_scp", "sample_rate", "speech_segment"}
    known = (inspect.signature(EnhPreprocessor).parameters.keys() | {"speed"}) - taken
    for key in conf:
        if key not in known:
            raise CmktError(f"unknown key {key}", path, remedy=f"one of {', '.join(sorted(known))}")
    for effect in conf.get("data_aug_effects", ()):
        for _, name, _ in effect[1] if isinstance(effect[1], list) else [effect]:
            if name not in effects_dict or name == "codecs":
                raise CmktError(
                    f"unknown effect {name}", path, remedy=f"one of {', '.join(effects_dict)}"
                )
    return conf


def build_mixing(conf: dict, noise_scp: str, rir_scp: str | None, fs: int, seed: int):
    """Build the preprocessor of the training data.

    Args:
        conf: as `read_mixing_config` gives it.
        noise_scp: list of noise files, at `fs`.
        rir_scp: list of impulse responses, at `fs`; None for none.
        fs: sampling rate in Hz.
        seed: of the training.

    Raises:
        CmktError: settings that ESPnet's preprocessor does not take.
    """
    try:
        return OnlineMixing(seed, noise_scp=noise_scp, rir_scp=rir_scp, sample_rate=fs, **conf)
    except (TypeError, ValueError, AssertionError) as error:
        raise CmktError(f"mixing settings that ESPnet does not take: {error}") from error


class SortedCollate:
    """Sorts a batch by length before ESPnet pads it: recurrent layers want the longest first.

    ESPnet's sampler sorts by the lengths before a change of speed.
    """

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, batch: list) -> tuple:
        """Collate a list of (utterance id, {name: array})."""
        return self.collate(sorted(batch, key=lambda item: -len(item[1]["speech_mix"])))


class EpochIterFactory(AbsIterFactory):
    """Tells someone which epoch begins, then lets ESPnet iterate.

    Args:
        factory: ESPnet's.
        begin: called with the epoch's number, from 1 on.
    """

    def __init__(self, factory: AbsIterFactory, begin: Callable[[int], None]):
        self.factory, self.begin = factory, begin

    def build_iter(self, epoch: int, shuffle: bool | None = None):
        """Return ESPnet's iterator of one epoch."""
        self.begin(epoch)
        return self.factory.build_iter(epoch, shuffle)
