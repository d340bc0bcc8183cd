"""Where the text of a training comes from: transcripts, a recogniser, or a control.

    transcript   the transcripts
    asr          a recogniser's, from the clean speech (`cmkt transcribe`)
    asr_noisy    a recogniser's, from the noisy speech
    partial:P    a share P of the transcripts; the other utterances count as without text
    corrupt:W    transcripts with substituted, deleted and inserted words at a word error rate W
    shuffled     the transcript of another utterance
    random       Gaussian vectors of the same mean and covariance, as many as there are tokens
    none         no text: no transfer at all

The last five are for studies. All but the recogniser's are made here, from the transcripts and a
seed. Scripts without spaces between words, as Mandarin, are corrupted character by character.
"""

import hashlib
import random
from dataclasses import dataclass

from cmkt.errors import CmktError
from cmkt.linguistic.word_errors import count_errors, is_unspaced

PLAIN = ("transcript", "asr", "asr_noisy", "shuffled", "random", "none")
WITH_AMOUNT = ("partial", "corrupt")
# Of the errors; recognisers substitute most.
SUBSTITUTIONS, DELETIONS = 0.6, 0.2


@dataclass(frozen=True)
class TextSource:
    """A source of text.

    Args:
        kind: see the module's text.
        amount: P of `partial`, W of `corrupt`.
    """

    kind: str
    amount: float | None = None

    @classmethod
    def parse(cls, text: str) -> "TextSource":
        """Read `--text_source`.

        Raises:
            CmktError: no such source, or an amount outside (0, 1].
        """
        kind, colon, amount = text.partition(":")
        if not colon and kind in PLAIN:
            return cls(kind)
        try:
            if kind in WITH_AMOUNT and 0 < float(amount) <= 1:
                return cls(kind, float(amount))
        except ValueError:
            pass
        raise CmktError(
            f"--text_source {text}: no such source of text",
            remedy=f"one of {', '.join(PLAIN)}, or {':P, '.join(WITH_AMOUNT)}:P with P in (0, 1]",
        )

    def apply(self, transcripts: dict[str, str], seed: int) -> tuple[dict[str, str], dict]:
        """Make the text of a training.

        Args:
            transcripts: {utterance: text}; a recogniser's for `asr` and `asr_noisy`.
            seed: of the controls.

        Returns:
            {utterance: text} and facts to record: the seed; `wer` or, without spaces, `cer`.
        """
        if self.kind == "partial":
            wanted = round(self.amount * len(transcripts))
            # In the order of a hash, so that a larger share contains a smaller one.
            kept = sorted(transcripts, key=lambda u: _digest(seed, u))[:wanted]
            return {u: transcripts[u] for u in sorted(kept)}, {"seed": seed}
        if self.kind == "shuffled":
            return _shuffled(transcripts, seed), {"seed": seed}
        if self.kind == "corrupt":
            texts, rate = _corrupted(transcripts, self.amount, seed)
            return texts, {"seed": seed, **rate}
        return transcripts, {"seed": seed} if self.kind == "random" else {}


def _digest(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def _shuffled(transcripts: dict[str, str], seed: int) -> dict[str, str]:
    """Give every utterance the text of the next one in a random circle."""
    order = sorted(transcripts, key=lambda u: _digest(seed, u))
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return {utterance: transcripts[following[utterance]] for utterance in transcripts}


def _corrupted(
    transcripts: dict[str, str], target: float, seed: int
) -> tuple[dict[str, str], dict]:
    """Corrupt all texts at a word error rate; return them and the rate that was reached."""
    split, space = (_characters, "") if is_unspaced(transcripts.values()) else (str.split, " ")
    units = {utterance: split(text) for utterance, text in transcripts.items()}
    vocabulary = [unit for line in units.values() for unit in line]
    rate = target
    # Neighbouring errors merge (a deletion beside an insertion is one substitution), so more of
    # them are needed than the rate says.
    for _ in range(6):
        texts = {
            utterance: space.join(
                _corrupt(line, rate, vocabulary, random.Random(_digest(seed, utterance)))
            )
            for utterance, line in units.items()
        }
        name, errors = count_errors(transcripts, texts)
        *wrong, total = map(sum, zip(*errors.values(), strict=True)) if errors else (0, 1)
        reached = sum(wrong) / total
        if abs(reached - target) < 0.005 or not reached:
            break
        rate = min(rate * target / reached, 1.0)
    return texts, {name: {"rate": round(reached, 4)}}


def _characters(text: str) -> list[str]:
    return list("".join(text.split()))


def _corrupt(
    line: list[str], rate: float, vocabulary: list[str], generator: random.Random
) -> list[str]:
    made = []
    for unit in line:
        if generator.random() >= rate:
            made.append(unit)
            continue
        kind, other = generator.random(), generator.choice(vocabulary)
        if kind < SUBSTITUTIONS:
            made.append(other)
        elif kind >= SUBSTITUTIONS + DELETIONS:
            made += [unit, other]
    # An empty text would count as an utterance without a transcript.
    return made or [generator.choice(vocabulary)]
