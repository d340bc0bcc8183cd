"""Windows of long utterances whose text is that of the words in them.

A window is drawn from (seed, epoch, utterance) and does not depend on the text, so that a baseline
and its CMKT twin hear the same audio. With word times (`cmkt.corpus.word_times`) it holds whole
words, and the embeddings of these words alone are kept. Without them, or where the tokens are not
those of the words, the window has no text: it trains the enhancement alone.
"""

import logging
import unicodedata
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmkt.corpus.datadir import read_table
from cmkt.corpus.word_times import Word, read_word_times
from cmkt.espnet_plugin.tokens import UNKNOWN

AUDIO = ("speech_", "noise_ref", "dereverb_ref")  # how the names of audio data begin in ESPnet
CONTINUES = "##"  # how WordPiece marks a piece inside a word


class Window(NamedTuple):
    """What is kept of an utterance.

    Args:
        begin: first sample.
        end: sample after the last one.
        first: number of the first word in it.
        last: number of the last word in it; below `first` where no word is known.
    """

    begin: int
    end: int
    first: int = 0
    last: int = -1


def generator_for(seed: int, epoch: int, utterance: str) -> np.random.Generator:
    """Return a random generator that depends on these three only."""
    digest = sha256(f"crop {seed} {epoch} {utterance}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def draw_window(
    words: list[Word], length: int, sample_rate: int, maximum: int, generator: np.random.Generator
) -> Window:
    """Draw a window of a long utterance.

    Args:
        words: with their times; empty where these are not known.
        length: samples of the utterance, above `maximum`.
        sample_rate: in Hz.
        maximum: samples of the longest window.
        generator: draws among the windows that no other window contains.

    Returns:
        a window of whole words, with as much of the pauses before and after as fits, at most to
        their middle; `maximum` samples anywhere where there is no word that fits.
    """
    starts = np.array([round(word.start * sample_rate) for word in words], dtype=int)
    ends = np.array([round(word.end * sample_rate) for word in words], dtype=int)
    starts, ends = starts.clip(0, length), ends.clip(0, length)
    candidates: list[tuple[int, int]] = []
    for first, start in enumerate(starts):
        # `ends` may fall where a word's end is given later than that of the next one.
        fits = np.flatnonzero(np.maximum.accumulate(ends[first:]) - start <= maximum)
        if len(fits) and (not candidates or first + fits[-1] > candidates[-1][1]):
            candidates.append((first, first + int(fits[-1])))
    if not candidates:
        begin = int(generator.integers(length - maximum + 1))
        return Window(begin, begin + maximum)
    first, last = candidates[generator.integers(len(candidates))]
    begin, end = int(starts[first]), int(ends[first : last + 1].max())
    before = begin - (begin + int(ends[:first].max())) // 2 if first else begin
    after = (end + int(starts[last + 1])) // 2 - end if last + 1 < len(words) else length - end
    before, after, room = max(before, 0), max(after, 0), maximum - (end - begin)
    left = min(before, max(room // 2, room - after))
    return Window(begin - left, end + min(after, room - left), first, last)


def _letters(text: str) -> str:
    """Return the letters and digits of a text, without case and accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in plain if character.isalnum())


def _byte_values() -> dict[str, int]:
    """Return which byte each character stands for in a byte-level vocabulary (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    values = {chr(byte): byte for byte in shown}
    return values | {chr(256 + number): byte for number, byte in enumerate(hidden)}


BYTE_VALUES = _byte_values()


def _decode_bytes(tokens: list[str]) -> list[str] | None:
    """Spell out tokens of a byte-level vocabulary; each character goes to the token it ends in."""
    try:
        values = [[BYTE_VALUES[character] for character in token] for token in tokens]
    except KeyError:
        return None
    texts, begun = [], b""
    for token in values:
        texts.append("")
        for value in token:
            begun += bytes([value])
            try:
                texts[-1] += begun.decode()
                begun = b""
            except UnicodeDecodeError:
                continue
    return None if begun else texts


def words_of_tokens(tokens: list[str], words: list[str]) -> list[tuple[int, int]] | None:
    """Find out of which words each token is, by the letters of both.

    Args:
        tokens: of a language model (WordPiece, SentencePiece, byte-level) or words or characters.
        words: of the same transcript; case, accents and punctuation do not matter.

    Returns:
        for each token its first and its last word; a token without a letter goes to the word
        before it. None where the letters differ.
    """
    owners = [number for number, word in enumerate(words) for _ in _letters(word)]
    wanted = "".join(map(_letters, words))
    plain = [token.removeprefix(CONTINUES) for token in tokens]
    for texts in (plain, _decode_bytes(tokens)):
        pieces = [] if texts is None else list(map(_letters, texts))
        if not wanted or "".join(pieces) != wanted:
            continue
        found, at = [], 0
        for piece in pieces:
            before = owners[max(at - 1, 0)]
            found.append((owners[at], owners[at + len(piece) - 1]) if piece else (before, before))
            at += len(piece)
        return found
    return None


class Cropping:
    """A preprocessor of ESPnet that crops the utterances that are longer than a maximum.

    Args:
        seed: with the epoch and the utterance, all that a window depends on.
        maximum: samples of the longest window.
        sample_rate: in Hz.
        words: word times of the long utterances; may lack any.
        tokens: {utterance: tokens in one string} of the linguistic store; may lack any.
        then: preprocessor of what is left; None for none.

    `epoch` is set before each epoch by the iterator factory of the task.
    """

    def __init__(
        self,
        seed: int,
        maximum: int,
        sample_rate: int,
        words: dict[str, list[Word]],
        tokens: dict[str, str],
        then: Callable[[str, dict], dict] | None = None,
    ):
        self.seed, self.maximum, self.sample_rate = seed, maximum, sample_rate
        self.words, self.tokens, self.then = words, tokens, then
        self.epoch = 0

    def __call__(self, uid: str, data: dict) -> dict:
        """Crop one utterance: audio (N,), `linguistic` (T_t, D_t), `token_ids` (T_t,)."""
        length = len(data["speech_mix"])
        if length > self.maximum:
            window = self.window(uid, length)
            audio = [name for name in data if name.startswith(AUDIO)]
            data = {**data, **{name: data[name][window.begin : window.end] for name in audio}}
            self._crop_text(uid, data, window)
        if self.then is None:
            return data
        self.then.epoch = self.epoch
        return self.then(uid, data)

    def window(self, uid: str, length: int) -> Window:
        """Return the window of an utterance of `length` samples in this epoch."""
        generator = generator_for(self.seed, self.epoch, uid)
        words = self.words.get(uid, [])
        return draw_window(words, length, self.sample_rate, self.maximum, generator)

    def owners(self, uid: str) -> list[tuple[int, int]] | None:
        """Return of which words each token of an utterance is; None where that is not known."""
        if uid not in self.words or uid not in self.tokens:
            return None
        words = [word.text for word in self.words[uid]]
        return words_of_tokens(self.tokens[uid].split(" "), words)

    def _crop_text(self, uid: str, data: dict, window: Window) -> None:
        if "linguistic" not in data:
            return
        kept = [
            number
            for number, (first, last) in enumerate(self.owners(uid) or [])
            if window.first <= first and last <= window.last
        ]
        if kept:
            data["linguistic"] = data["linguistic"][kept]
        else:  # as of an utterance without a transcript
            data["linguistic"] = np.zeros_like(data["linguistic"][:1])
        if "token_ids" in data:
            ids = data["token_ids"]
            data["token_ids"] = ids[kept] if kept else np.full_like(ids[:1], UNKNOWN)


def build_cropping(
    seed: int,
    maximum: int,
    sample_rate: int,
    lengths: dict[str, int],
    word_times: str | Path | None,
    tokens: str | Path | None,
    then: Callable[[str, dict], dict] | None,
) -> Cropping:
    """Build the cropping of a training set, and log how much text it costs.

    Args:
        seed: of the training.
        maximum: samples of the longest window.
        sample_rate: in Hz.
        lengths: {utterance: samples}.
        word_times: CTM file; None for none.
        tokens: table `tokens` of the linguistic store; None for none.
        then: preprocessor of what is left; None for none.

    Raises:
        CmktError: a file that is missing or broken.
    """
    long = {utterance for utterance, length in lengths.items() if length > maximum}
    words = read_word_times(word_times, long) if word_times else {}
    said = {u: line for u, line in read_table(tokens).items() if u in long} if tokens else {}
    cropping = Cropping(seed, maximum, sample_rate, words, said, then)
    lost = sum(cropping.owners(utterance) is None for utterance in said)
    logging.info(
        f"{len(long)} of {len(lengths)} utterances are longer than {maximum / sample_rate:g} s "
        f"and are cropped; {len(words)} of these at words"
    )
    if lost:
        logging.warning(
            f"{lost} of {len(said)} cropped utterances lose their text: no word times, or words "
            "that differ from their tokens"
        )
    return cropping
