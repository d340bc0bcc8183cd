"""Makes the mixtures of one utterance: draws SNR, noise or babble, and a room; mixes; writes."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cmkt.corpus.audio import read_audio
from cmkt.corpus.babble import Babble
from cmkt.corpus.level import is_silent, mix_at_snr
from cmkt.corpus.noise import read_stretch
from cmkt.corpus.rooms import read_impulse_response, reverberate
from cmkt.corpus.source import Source, check_pair
from cmkt.errors import CmktError
from cmkt.stage import atomic_file

SNR_LIMIT = 40.0  # dB; beyond, 16 bits cannot hold the weaker part to 0.1 dB


@dataclass(frozen=True)
class SnrPlan:
    """How SNRs are chosen; see the help of --snr for the forms that `parse` takes.

    Args:
        kind: `range`, `choice` or `each`.
        values: in dB; the two ends of a range.
    """

    kind: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "SnrPlan":
        """Read the value of --snr."""
        kind = "each" if text.startswith("each:") else "range" if ":" in text else "choice"
        numbers = text.removeprefix("each:").split(":" if kind == "range" else ",")
        try:
            values = tuple(float(number) for number in numbers)
        except ValueError:
            values = ()
        if (
            not values
            or not all(abs(value) <= SNR_LIMIT for value in values)
            or len(set(values)) != len(values)
            or (kind == "range" and (len(values) != 2 or values[0] > values[1]))
        ):
            raise CmktError(
                f"--snr {text}: want low:high, a,b,c or each:a,b,c",
                remedy=f"different values in dB from {-SNR_LIMIT:g} to {SNR_LIMIT:g}",
            )
        return cls(kind, values)

    def draw(self, rng: np.random.Generator) -> list[float]:
        """Return the SNRs of one utterance, in dB."""
        if self.kind == "range":
            return [round(rng.uniform(*self.values), 2)]
        if self.kind == "choice":
            return [self.values[rng.integers(len(self.values))]]
        return list(self.values)


@dataclass(frozen=True)
class Item:
    """What one mixture is made of: the input, its reference if the data is paired, its speaker."""

    source: Source
    reference: Source | None
    speaker: str


@dataclass(frozen=True)
class Rooms:
    """Room impulse responses, and how they are used.

    Args:
        files: {name: file}.
        share: of the utterances that are put into a room.
        reference: see `cmkt.corpus.rooms.reverberate`.
    """

    files: dict[str, Path]
    share: float
    reference: str


@dataclass(frozen=True)
class Mixer:
    """Makes the mixtures of one utterance at a time; see the help of `cmkt mix`.

    Args:
        folder: where audio/ and spk1/ lie.
        noise: {name: file}; empty for paired data.
        plan: SNRs.
        seed: with the utterance id, all that the draw depends on.
        fs: output sampling rate in Hz.
        channel: which channel of multi-channel files.
        babble: of the other speakers; None for none.
        rooms: impulse responses; None for none.
    """

    folder: Path
    noise: dict[str, Path]
    plan: SnrPlan
    seed: int
    fs: int
    channel: int
    babble: Babble | None = None
    rooms: Rooms | None = None

    def __call__(self, item: Item) -> dict:
        """Write one utterance.

        Returns:
            `utterance`; `mixtures`: (id, SNR in dB, noise name, room name) of each one written;
            `skipped`: {what was passed over: why}; `unreadable`: {name: the error}.
        """
        name = item.source.name
        result = {"utterance": name, "mixtures": [], "skipped": {}, "unreadable": {}}
        try:
            audio, rate = item.source.read(self.channel)
            reference = item.reference and item.reference.read(self.channel)
        except CmktError as error:
            result["unreadable"][name] = str(error)
            return result
        if reference is not None:
            check_pair(item.reference, (len(audio), rate), (len(reference[0]), reference[1]))
            self._copy(name, self._converted(audio, rate), self._converted(*reference))
            result["mixtures"].append((name, None, None, None))
            return result
        speech = self._converted(audio, rate)
        if is_silent(speech, self.fs):
            result["skipped"][name] = "silent speech"
            return result
        rng = self._generator(name)
        snrs = self.plan.draw(rng)
        noise_name, noise = self._draw_noise(rng, item, len(speech), result)
        if noise is None:
            result["skipped"][name] = "found only silence in the noise"
            return result
        room, speech, target = self._draw_room(name, speech)
        for snr in snrs:
            key = f"{name}_snr{snr:g}" if self.plan.kind == "each" else name
            self._write(key, *mix_at_snr(speech, noise, snr, self.fs, target))
            result["mixtures"].append((key, snr, noise_name, room))
        return result

    def _generator(self, *names: str) -> np.random.Generator:
        digest = hashlib.sha256(" ".join([str(self.seed), *names]).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest, "big"))

    def _draw_noise(self, rng, item: Item, length: int, result: dict) -> tuple:
        """Return the name of the noise and its samples; None, None if there is only silence."""
        if self.babble is not None:
            # A generator of its own: the other draws are the same with and without babble.
            own = self._generator("babble", item.source.name)
            if own.random() < self.babble.share:
                name, noise = self.babble.draw(own, item.speaker, length, self.fs, self.channel)
                if not is_silent(noise, self.fs):
                    return name, noise
        names = list(self.noise)
        for index in rng.permutation(len(names)):
            name, position = names[index], rng.random()
            path = self.noise[name]
            try:
                noise = read_stretch(path, length, self.fs, position, self.channel)
                if not is_silent(noise, self.fs):
                    return name, noise
                channel = self.channel if soundfile.info(str(path)).channels > 1 else 0
                if is_silent(*read_audio(path, None, channel)):
                    result["skipped"][name] = "silent noise"
            except CmktError as error:
                result["unreadable"][name] = str(error)
        return None, None

    def _draw_room(self, name: str, speech: np.ndarray) -> tuple:
        """Return the name of a room, the speech in it, its reference; or None, the speech, None."""
        rng = self._generator("room", name)
        if self.rooms is None or rng.random() >= self.rooms.share:
            return None, speech, None
        room = sorted(self.rooms.files)[rng.integers(len(self.rooms.files))]
        response = read_impulse_response(self.rooms.files[room], self.fs)
        return room, *reverberate(speech, response, self.fs, self.rooms.reference)

    def _copy(self, name: str, audio: np.ndarray, reference: np.ndarray) -> None:
        # Only conversion of the rate can take a file beyond full scale.
        peak = max(np.abs(audio).max(), np.abs(reference).max(), 1.0)
        self._write(name, audio / peak, reference / peak)

    def _converted(self, audio: np.ndarray, rate: int) -> np.ndarray:
        return audio if rate == self.fs else soxr.resample(audio, rate, self.fs)

    def _write(self, key: str, mixture: np.ndarray, reference: np.ndarray) -> None:
        for folder, samples in (("audio", mixture), ("spk1", reference)):
            write_wav(self.folder / shard_path(folder, key), samples, self.fs)


def shard_path(folder: str, key: str) -> str:
    """Return `folder/<two hexadecimal digits>/key.wav`.

    A folder of all 281 000 utterances of LibriSpeech would be slow on many file systems.
    """
    return f"{folder}/{hashlib.sha256(key.encode()).hexdigest()[:2]}/{key}.wav"


def write_wav(path: Path, samples: np.ndarray, fs: int) -> None:
    """Write samples (N,) as 16-bit wav, under the final name only when complete."""
    integers = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
    # Through memory: libsndfile would hide that the device is full.
    encoded = io.BytesIO()
    soundfile.write(encoded, integers, fs, format="WAV", subtype="PCM_16")
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path, "wb") as stream:
        stream.write(encoded.getvalue())
