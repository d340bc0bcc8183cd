"""Kaldi data directories: what is wrong is told with file, line and remedy."""

import pytest

from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.errors import CmktError


def write(folder, **tables):
    folder.mkdir(exist_ok=True)
    defaults = {"wav_scp": "a a.wav\nb b.wav\n", "utt2spk": "a s\nb s\n"}
    for name, text in {**defaults, **tables}.items():
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name.replace("_scp", ".scp")).write_bytes(data)
    return folder


def test_written_directory_reads_back_the_same(tmp_path):
    data = DataDirectory(
        {"b": "b x.wav", "a": "a.wav"},
        {"a": "s1", "b": "s2"},
        {"a": "c", "b": "d"},
        {"b": "words é"},
    )
    data.write(tmp_path)
    assert DataDirectory.read(tmp_path) == data
    assert list(read_table(tmp_path / "wav.scp")) == ["a", "b"]
    assert (tmp_path / "spk2utt").read_text() == "s1 a\ns2 b\n"


def test_speakers_of_several_utterances(tmp_path):
    DataDirectory({"a": "1", "b": "2"}, {"b": "s", "a": "s"}).write(tmp_path)
    assert (tmp_path / "spk2utt").read_text() == "s a b\n"
    assert not (tmp_path / "spk1.scp").exists() and not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    "tables, where, what",
    [
        ({"utt2spk": "a s\n"}, "wav.scp:2:", "b is not in utt2spk"),
        ({"utt2spk": "a s\nb s\nc s\n"}, "utt2spk:3:", "unknown utterance c"),
        ({"wav_scp": "a a.wav\na b.wav\n"}, "wav.scp:2:", "twice"),
        ({"wav_scp": "b b.wav\na a.wav\n"}, "wav.scp:2:", "LC_ALL=C sort"),
        ({"wav_scp": "a a.wav\nb\n"}, "wav.scp:2:", "without a value"),
        ({"wav_scp": "a a.wav\n\nb b.wav\n"}, "wav.scp:2:", "empty line"),
        ({"wav_scp": ""}, "wav.scp:", "no utterances"),
        ({"text": "a yes\nc who\n"}, "text:2:", "unknown utterance c"),
        ({"text": b"a yes\nb caf\xe9\n"}, "text:2:", "not UTF-8"),
        ({"spk1_scp": "a a.wav\n"}, "wav.scp:2:", "b is not in spk1.scp"),
        ({"wav_scp": "a a.wav\nb cat b.wav |\n"}, "wav.scp:2:", "--allow_pipes"),
        ({"spk1_scp": "a cat a |\nb b.wav\n"}, "spk1.scp:1:", "--allow_pipes"),
    ],
)
def test_bad_directory_is_named(tmp_path, tables, where, what):
    folder = write(tmp_path / "data", **tables)
    with pytest.raises(CmktError) as caught:
        DataDirectory.read(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/{where}") and what in message
    assert "\n" not in message


def test_pipes_can_be_trusted(tmp_path):
    folder = write(tmp_path / "data", wav_scp="a a.wav\nb cat b.wav |\n")
    assert DataDirectory.read(folder, allow_pipes=True).wav["b"] == "cat b.wav |"


def test_missing_directory_and_file(tmp_path):
    with pytest.raises(CmktError, match="no such data directory"):
        DataDirectory.read(tmp_path / "none")
    with pytest.raises(CmktError, match=r"wav\.scp: no such file"):
        DataDirectory.read(tmp_path)
