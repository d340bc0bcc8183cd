"""Cropping: whole words, their tokens alone, the same windows every time."""

import numpy as np
import pytest

from cmkt.corpus.word_times import Word, copy_word_times, read_word_times, write_word_times
from cmkt.errors import CmktError
from cmkt.espnet_plugin.cropping import (
    Cropping,
    build_cropping,
    draw_window,
    generator_for,
    words_of_tokens,
)

RATE = 1000


def make_words(generator: np.random.Generator, count: int) -> tuple[list[Word], int]:
    """Return words with pauses between them, and the samples of the utterance."""
    at, words = generator.uniform(0, 0.5), []
    for number in range(count):
        end = at + generator.uniform(0.05, 0.9)
        words.append(Word(f"word{number}", at, end))
        at = end + generator.choice([0.0, generator.uniform(0, 2)])
    return words, int(at * RATE) + 200


@pytest.mark.parametrize("seed", range(50))
def test_a_window_holds_whole_words_and_no_part_of_others(seed):
    generator = np.random.default_rng(seed)
    words, length = make_words(generator, int(generator.integers(2, 30)))
    maximum = int(generator.integers(950, 4000))  # no word is longer
    if maximum >= length:
        maximum = length - 1
    for epoch in range(10):
        draw = generator_for(0, epoch, f"utterance{seed}")
        window = draw_window(words, length, RATE, maximum, draw)
        assert 0 <= window.begin < window.end <= length
        assert window.end - window.begin <= maximum
        assert window.first <= window.last
        for number, word in enumerate(words):
            begin, end = round(word.start * RATE), round(word.end * RATE)
            if window.first <= number <= window.last:
                assert window.begin <= begin and end <= window.end
            else:
                assert end <= window.begin or begin >= window.end


def test_every_word_is_heard_in_some_epoch():
    words, length = make_words(np.random.default_rng(0), 20)
    heard = set()
    for epoch in range(200):
        window = draw_window(words, length, RATE, 3000, generator_for(0, epoch, "a"))
        heard |= set(range(window.first, window.last + 1))
    assert heard == set(range(20))


def test_without_word_times_the_window_is_as_long_as_allowed():
    windows = {draw_window([], 5000, RATE, 900, generator_for(0, e, "a")) for e in range(20)}
    assert len(windows) > 10
    assert all(w.end - w.begin == 900 and w.last < w.first and w.end <= 5000 for w in windows)
    # A word that is longer than the window cannot be kept whole.
    window = draw_window([Word("long", 0, 5)], 5000, RATE, 900, generator_for(0, 0, "a"))
    assert window.last < window.first


TOKENIZERS = {
    "wordpiece": (["the", "un", "##believ", "##able", ",", "cafe", "'", "s"],
                  "the Unbelievable café's", [0, 1, 1, 1, 1, 2, 2, 2]),
    "sentencepiece": (["▁the", "▁un", "believable", "▁caf", "é"], "the unbelievable café",
                      [0, 1, 1, 2, 2]),
    "byte-level": (["the", "Ġun", "believable", "Ġcaf", "Ã©"], "the unbelievable café",
                   [0, 1, 1, 2, 2]),
    "byte-level Mandarin": (["ä½łå¥½", "ä¸ĸ", "çķ", "Į"], "你好 世界", [0, 1, 1, 1]),
    "characters": (list("猫在沙发"), "猫 在 沙发", [0, 1, 2, 2]),
    "words": (["hello", "world"], "HELLO, WORLD.", [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_find_their_words(kind):
    tokens, text, owners = TOKENIZERS[kind]
    assert words_of_tokens(tokens, text.split()) == [(owner, owner) for owner in owners]


def test_a_token_over_two_words_and_another_text():
    assert words_of_tokens(["我们", "好"], ["我", "们好"]) == [(0, 1), (1, 1)]
    assert words_of_tokens(["another", "text"], ["hello", "world"]) is None
    assert words_of_tokens([","], ["hello"]) is None


def example(words: int = 12):
    """Return an utterance of words of 0.5 s, one token each, whose embeddings are their number."""
    times = [Word(f"word{n}", 0.5 * n, 0.5 * n + 0.4) for n in range(words)]
    samples = np.arange(words * RATE // 2, dtype=np.float32)
    data = {
        "speech_mix": samples,
        "speech_ref1": samples + 1,
        "linguistic": np.repeat(np.arange(1.0, words + 1, dtype=np.float32)[:, None], 3, axis=1),
        "token_ids": np.arange(1, words + 1),
    }
    return times, data, " ".join(word.text for word in times)


def test_audio_and_text_are_cropped_alike_and_reproducibly():
    times, data, tokens = example()
    cropping = Cropping(3, 1600, RATE, {"a": times}, {"a": tokens})
    seen = set()
    for epoch in range(1, 9):
        cropping.epoch = epoch
        out = cropping("a", data)
        audio, ids = out["speech_mix"], out["token_ids"]
        assert len(audio) <= 1600 and np.array_equal(out["speech_ref1"], audio + 1)
        inside = [n for n, w in enumerate(times, 1)
                  if audio[0] <= w.start * RATE and w.end * RATE <= audio[-1] + 1]  # fmt: skip
        assert ids.tolist() == inside == out["linguistic"][:, 0].tolist()
        assert len(inside) == 3
        # The same again, and the same audio for a baseline, which has no text.
        assert np.array_equal(cropping("a", data)["speech_mix"], audio)
        baseline = {name: data[name] for name in ("speech_mix", "speech_ref1")}
        bare = Cropping(3, 1600, RATE, {"a": times}, {})
        bare.epoch = epoch
        assert np.array_equal(bare("a", baseline)["speech_mix"], audio)
        seen.add(audio[0])
    assert len(seen) > 3
    assert len(data["speech_mix"]) == 6000  # a cache of ESPnet's keeps the whole


@pytest.mark.parametrize("lacks", ["times", "tokens", "agreement"])
def test_text_without_word_times_counts_as_missing(lacks):
    times, data, tokens = example()
    words = {} if lacks == "times" else {"a": times}
    said = {} if lacks == "tokens" else {"a": "of another utterance"}
    if lacks == "times":
        said = {"a": tokens}
    out = Cropping(0, 1600, RATE, words, said)("a", data)
    assert out["linguistic"].shape == (1, 3) and not out["linguistic"].any()
    assert out["token_ids"].tolist() == [0]


def test_short_utterances_stay_whole():
    times, data, tokens = example()
    out = Cropping(0, 6000, RATE, {"a": times}, {"a": tokens})("a", data)
    assert all(np.array_equal(out[name], data[name]) for name in data)


def test_what_follows_gets_the_window_and_the_epoch():
    times, data, _ = example()

    class Following:
        def __call__(self, uid, data):
            self.got = uid, self.epoch, len(data["speech_mix"])
            return data

    following = Following()
    cropping = Cropping(0, 1600, RATE, {"a": times}, {}, following)
    cropping.epoch = 7
    length = len(cropping("a", data)["speech_mix"])
    assert following.got == ("a", 7, length) and length <= 1600


def test_word_times_are_written_read_and_copied(tmp_path):
    words = {"b": [Word("你好", 0.0, 0.25), Word("再见", 0.5, 1.0)], "a": [Word("hi", 0.125, 0.5)]}
    write_word_times(tmp_path / "ctm", words)
    assert read_word_times(tmp_path / "ctm") == words
    assert read_word_times(tmp_path / "ctm", {"a"}) == {"a": words["a"]}
    copy_word_times(tmp_path / "ctm", tmp_path / "copy", {"b_snr0": "b", "b_snr5": "b", "c": "c"})
    assert read_word_times(tmp_path / "copy") == {"b_snr0": words["b"], "b_snr5": words["b"]}
    with (tmp_path / "ctm").open("a") as stream:
        stream.write(";; a comment\nz 1 0.0 0.1 x 0.9\n")
    assert read_word_times(tmp_path / "ctm")["z"] == [Word("x", 0.0, 0.1)]


@pytest.mark.parametrize(
    "line", ["a 1 0.5 0.1", "a 1 zero 0.1 x", "a 1 0.1 0.1 x", "a 1 nan 0.1 x", "a 1 0.9 -1 x"]
)
def test_broken_word_times_name_the_line(line, tmp_path):
    (tmp_path / "ctm").write_text(f"a 1 0.3 0.1 w\n{line}\n")
    with pytest.raises(CmktError, match="ctm:2: "):
        read_word_times(tmp_path / "ctm")


def test_building_tells_how_much_text_is_lost(tmp_path, caplog):
    caplog.set_level("INFO")
    times, _, tokens = example()
    write_word_times(tmp_path / "ctm", {"a": times})
    (tmp_path / "tokens").write_text(f"a {tokens}\nb {tokens}\nc {tokens}\n")
    lengths = {"a": 6000, "b": 6000, "c": 100}
    files = tmp_path / "ctm", tmp_path / "tokens"
    build_cropping(0, 1600, RATE, lengths, *files, None)
    assert "2 of 3 utterances are longer than 1.6 s" in caplog.text
    assert "1 of 2 cropped utterances lose their text" in caplog.text
