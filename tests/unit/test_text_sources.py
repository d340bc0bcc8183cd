"""Sources of text for a training: what the controls do to transcripts."""

import jiwer
import pytest

from cmkt.errors import CmktError
from cmkt.linguistic.sources import TextSource

ENGLISH = {
    f"u{n:03d}": f"the {a} {b} {c} near the {d} every evening"
    for n, (a, b, c, d) in enumerate(
        (a, b, c, d)
        for a in ("old", "young", "tall", "clever")
        for b in ("farmer", "captain", "doctor")
        for c in ("sings", "waits", "reads", "sleeps")
        for d in ("river", "bridge", "station")
    )
}
MANDARIN = {f"m{n:03d}": f"{a}在{b}看{c}" for n, (a, b, c) in enumerate(
    (a, b, c) for a in ("老师", "学生", "妈妈") for b in ("学校", "家里", "公园")
    for c in ("电影", "报纸", "风景"))}  # fmt: skip


@pytest.mark.parametrize("text", ["none", "transcript", "asr", "partial:0.5", "corrupt:1"])
def test_known_sources_are_read(text):
    assert TextSource.parse(text).kind == text.partition(":")[0]


@pytest.mark.parametrize(
    "text", ["", "transcripts", "partial", "partial:0", "corrupt:1.5", "corrupt:x", "shuffled:1"]
)
def test_unknown_sources_are_refused_with_those_that_exist(text):
    with pytest.raises(CmktError, match="one of transcript, asr, .*partial:P"):
        TextSource.parse(text)


def test_a_text_of_one_word_is_corrupted_as_a_word():
    texts = {**ENGLISH, **{f"w{n:02d}": "unbelievable" for n in range(40)}}
    corrupted, _ = TextSource("corrupt", 0.5).apply(texts, seed=0)
    words = {word for text in texts.values() for word in text.split()}
    assert all(word in words for text in corrupted.values() for word in text.split())
    assert any(corrupted[f"w{n:02d}"] != "unbelievable" for n in range(40))


@pytest.mark.parametrize("texts", [ENGLISH, MANDARIN], ids=["words", "characters"])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6])
def test_corrupt_reaches_the_stated_word_error_rate(texts, rate):
    corrupted, facts = TextSource("corrupt", rate).apply(texts, seed=1)
    assert corrupted.keys() == texts.keys() and all(corrupted.values())
    found = jiwer.process_words(
        *(
            [text if texts is ENGLISH else " ".join(text) for text in table.values()]
            for table in (texts, corrupted)
        )
    )
    assert found.wer == pytest.approx(rate, abs=0.02)
    assert facts["wer" if texts is ENGLISH else "cer"]["rate"] == pytest.approx(found.wer, abs=1e-3)
    assert min(found.substitutions, found.deletions, found.insertions) > 0
    assert any(" " in text for text in corrupted.values()) == (texts is ENGLISH)
    assert TextSource("corrupt", rate).apply(texts, seed=1)[0] == corrupted
    assert TextSource("corrupt", rate).apply(texts, seed=2)[0] != corrupted


def test_partial_keeps_the_stated_share_and_larger_shares_contain_smaller_ones():
    shares = {}
    for share in (0.25, 0.5, 1.0):
        shares[share], _ = TextSource("partial", share).apply(ENGLISH, seed=0)
        assert len(shares[share]) == round(share * len(ENGLISH))
        assert shares[share].items() <= ENGLISH.items()
        assert list(shares[share]) == sorted(shares[share])
    assert shares[0.25].keys() < shares[0.5].keys() < shares[1.0].keys()
    assert TextSource("partial", 0.5).apply(ENGLISH, seed=1)[0].keys() != shares[0.5].keys()


def test_shuffled_gives_everyone_anothers_text_and_loses_none():
    shuffled, _ = TextSource("shuffled").apply(ENGLISH, seed=0)
    assert sorted(shuffled.values()) == sorted(ENGLISH.values())
    assert all(shuffled[utterance] != ENGLISH[utterance] for utterance in ENGLISH)
