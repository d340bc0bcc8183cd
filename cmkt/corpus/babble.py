"""Babble: several other speakers of the same data directory, talking at once."""

from dataclasses import dataclass

import numpy as np
import soxr

from cmkt.corpus.level import active_power, is_silent
from cmkt.corpus.noise import fit_length
from cmkt.corpus.source import Source
from cmkt.errors import CmktError

SPREAD = 6.0  # dB between the loudest talker and the softest


@dataclass(frozen=True)
class Babble:
    """Draws babble for an utterance; its own speaker is never in it.

    Args:
        utterances: of each speaker. They come from the set that is mixed, so talkers of the test
            set are never in training.
        talkers: fewest and most that talk at once.
        share: of the utterances that get babble instead of noise from a file.
    """

    utterances: dict[str, list[Source]]
    talkers: tuple[int, int]
    share: float

    @classmethod
    def of(
        cls, speakers: dict[str, str], sources: list[Source], talkers: tuple[int, int], share: float
    ) -> "Babble":
        """Gather the utterances of each speaker.

        Args:
            speakers: of each utterance, utt2spk.
            sources: the utterances.
            talkers: see the class, as `share`.

        Raises:
            CmktError: too few speakers, or numbers of talkers that cannot be.
        """
        if not 1 <= talkers[0] <= talkers[1]:
            raise CmktError("--babble_talkers: want FEWEST MOST, from 1 on")
        utterances: dict[str, list[Source]] = {}
        for source in sources:
            utterances.setdefault(speakers[source.name], []).append(source)
        if len(utterances) <= talkers[0]:
            raise CmktError(
                f"babble of {talkers[0]} talkers and the speaker make more speakers than "
                f"the {len(utterances)} there are",
                sources[0].file,
                remedy="lower --babble_talkers or set --babble_share 0",
            )
        return cls(utterances, talkers, share)

    def draw(
        self, rng: np.random.Generator, speaker: str, length: int, fs: int, channel: int
    ) -> tuple[str, np.ndarray]:
        """Return a name, `babble:<speaker>+<speaker>...`, and the babble (length,).

        Args:
            rng: random generator.
            speaker: who says the utterance that the babble is for.
            length: in samples.
            fs: sampling rate in Hz.
            channel: of recordings that have several.
        """
        others = [name for name in sorted(self.utterances) if name != speaker]
        most = min(self.talkers[1], len(others))
        count = rng.integers(self.talkers[0], most + 1)
        chosen = [others[i] for i in rng.choice(len(others), count, replace=False)]
        total = np.zeros(length)
        for name in chosen:
            said = self._monologue(rng, self.utterances[name], length, fs, channel)
            if not is_silent(said, fs):
                level = 10 ** (-rng.uniform(0, SPREAD) / 20)
                total += said * level / np.sqrt(active_power(said, fs))
        return f"babble:{'+'.join(chosen)}", total

    @staticmethod
    def _monologue(rng, sources: list[Source], length: int, fs: int, channel: int) -> np.ndarray:
        """Let one speaker say one utterance after the other, beginning anywhere."""
        pieces, missing = [np.zeros(0)], length
        for index in rng.permutation(len(sources)):
            try:
                samples, rate = sources[index].read(channel)
            except CmktError:  # named where it is to be mixed itself
                continue
            if rate != fs:
                samples = soxr.resample(samples, rate, fs)
            pieces.append(samples)
            missing -= len(samples)
            if missing <= 0:
                break
        said = np.concatenate(pieces)
        return fit_length(said, length, fs, rng.random()) if len(said) else np.zeros(length)
