"""Look at a linguistic store: what is in it, what is missing, which tokens lie close together.

Prints sizes, token statistics and missing utterances of the store PATH, and for a few tokens the
five nearest others, with their cosines; draws a map of the tokens, the two directions in which
they differ most (PCA).

A token's vector is the mean over its occurrences in a sample of the utterances. Each dimension is
standardised (statistics.npz) before cosines are taken: embeddings of BERT-like models share a
large common vector, so raw ones of any two tokens have a high cosine. How high is printed too; it
is what a training with raw targets starts from.
"""

import logging
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np

from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.linguistic.statistics import read_statistics
from cmkt.linguistic.store import STATISTICS, LinguisticStore
from cmkt.stage import atomic_file

TYPES = 2000  # most frequent tokens that get a vector, so that memory does not grow
OCCURRENCES = 50  # utterances read of a token that --words names
NEAREST = 5
SHOWN = 5  # tokens with neighbours, missing utterances
LABELS = 120  # tokens of the map to label, where there is room
LAST_RESORT = "Last Resort High-Efficiency"  # a font that draws boxes for everything
SPACE = "\u2581"  # shown for the space that some tokenizers put into a token


def add_arguments(parser) -> None:
    """Add the options of `cmkt inspect-store`."""
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="folder of the store")
    expected = parser.add_mutually_exclusive_group()
    expected.add_argument(
        "--text", type=Path, help="utterances that should be there (default: those of PATH/text)"
    )
    expected.add_argument("--data_dir", type=Path, help="the same, from its wav.scp")
    add("--words", help="tokens to find neighbours of, for example king,queen (default: some "
        "frequent ones with a meaning of their own)")  # fmt: skip
    add("--sample", type=int, default=2000,
        help="utterances whose matrices are read (default: %(default)s)")  # fmt: skip
    add("--check", action="store_true", help="read all matrices, to prove them readable")
    add("--plot", type=Path, help="the map (default: PATH/tokens.png)")


def run(args) -> None:
    """Run `cmkt inspect-store` with parsed arguments.

    Raises:
        CmktError: not a store, a corrupt one, or a wrong option.
    """
    if args.sample < 1:
        raise CmktError(f"--sample {args.sample}: want at least 1")
    words = [word.strip() for word in (args.words or "").split(",") if word.strip()]
    expected = args.text or (args.data_dir and args.data_dir / "wav.scp") or args.path / "text"
    inspect_store(args.path, expected, words, args.sample, args.check, args.plot)


def inspect_store(
    path: str | Path,
    expected: str | Path,
    words: list[str] = (),
    sample: int = 2000,
    check: bool = False,
    plot: str | Path | None = None,
) -> None:
    """Print what is in a store and draw its tokens.

    Args:
        path: folder of the store.
        expected: a Kaldi table of the utterances that should be there.
        words: tokens to find neighbours of.
        sample: utterances whose matrices are read.
        check: read all matrices.
        plot: PNG to write; None: `tokens.png` in the store.

    Raises:
        CmktError: not a store, or a corrupt one.
    """
    store = LinguisticStore(path)
    tokens = {key: line.split() for key, line in read_table(store.folder / "tokens").items()}
    if tokens.keys() != store.places.keys() or not tokens:
        raise CmktError(
            "corrupt store: not the utterances of linguistic.scp",
            store.folder / "tokens",
            remedy="remove the store and run stage 3 again",
        )
    wanted = read_table(expected)
    plot = Path(plot) if plot else store.folder / "tokens.png"
    # All of the output waits for the checks.
    names = _names(tokens)
    rows = [*_describe(store, tokens, names), *_missing(store, wanted, Path(expected))]
    if check:
        for _, _, utterance, _ in store.raw():
            _read(store, utterance, len(tokens[utterance]))
        rows.append(("checked", "all matrices can be read"))
    vectors = average_types(store, tokens, names, words, sample)
    raw, standardised = vectors.cosines
    rows += [
        ("sample", f"{vectors.utterances} of {len(store)} utterances, {vectors.rows} rows, "
                   f"{len(vectors.types)} tokens; what follows is of these"),
        ("cosine", f"of any two rows {raw:.3f} raw, {standardised:.3f} standardised (mean)"),
    ]  # fmt: skip
    rows += [("nearest", line) for line in _neighbours(vectors, words)]
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_map(vectors, plot)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        reason = error.strerror or "cannot be written"
        raise CmktError(f"the map: {reason}", plot, remedy="give --plot FILE.png") from error
    rows.append(("map", str(plot)))
    last = None
    for name, value in rows:
        print(f"{name if name != last else '':<12}{value}")
        last = name


def _describe(
    store: LinguisticStore, tokens: dict[str, list[str]], names: dict[str, str]
) -> list[tuple[str, str]]:
    meta = store.meta
    lengths = np.array([len(line) for line in tokens.values()])
    counts = Counter(token for line in tokens.values() for token in line)
    common = "  ".join(f"{names[token]} {count}" for token, count in counts.most_common(8))
    once = sum(count == 1 for count in counts.values())
    matrices = sum(meta["arks"].values()) / 1e6
    total = sum(file.stat().st_size for file in store.folder.iterdir() if file.is_file()) / 1e6
    source = (meta.get("text") or {}).get("source", "not recorded")
    least, median, most = lengths.min(), np.median(lengths), lengths.max()
    return [
        ("store", str(store.folder)),
        ("model", f"{meta.get('model')}, layer {meta.get('layer')}, dimension {meta['dimension']}"),
        ("text", f"source {source}, normaliser {meta.get('normaliser', 'not recorded')}"),
        ("utterances", f"{len(store)}, of {len(set(store.places.values()))} different texts"),
        ("rows", f"{lengths.sum()}, one for each {meta.get('unit', 'token')}; "
                 f"{least} to {most} an utterance, median {median:g}"),
        ("tokens", f"{len(counts)} different ones, {once} of them seen once"),
        ("frequent", common),
        ("disk", f"{total:.1f} MB, {matrices:.1f} of them matrices "
                 f"({meta.get('storage', 'float32')})"),
    ]  # fmt: skip


def _missing(store: LinguisticStore, wanted: dict[str, str], path: Path) -> list[tuple[str, str]]:
    reasons = read_table(file) if (file := store.folder / "skipped").exists() else {}
    missing = [utterance for utterance in wanted if utterance not in store.places]
    rows = [("missing", f"{len(missing)} of {len(wanted)} utterances in {path}")]
    for utterance in missing[:SHOWN]:
        rows.append(("missing", f"{utterance} ({reasons.get(utterance, 'not in the store')})"))
    if len(missing) > SHOWN:
        rows.append(("missing", f"and {len(missing) - SHOWN} more"))
    return rows


def _read(store: LinguisticStore, utterance: str, count: int) -> np.ndarray:
    """Return a matrix (count, D) of a store.

    Raises:
        CmktError: it is not there, of another shape, or not of finite numbers.
    """
    matrix, shape = store[utterance], (count, store.meta["dimension"])
    if matrix.shape != shape or not np.isfinite(matrix).all():
        name, offset = store.places[utterance]
        is_what = "not finite" if matrix.shape == shape else f"{matrix.shape}, not {shape}"
        raise CmktError(
            f"corrupt store: matrix of utterance {utterance} at byte {offset} is {is_what}",
            store.folder / name,
            remedy="remove the store and run stage 3 again",
        )
    return matrix


@dataclass
class TypeVectors:
    """Mean vectors of the tokens in a sample of a store.

    Args:
        types: N tokens, the most frequent first.
        names: how they are shown.
        counts: occurrences of each in the sample.
        means: (N, D) standardised.
        cosines: mean over any two rows of the sample, raw and standardised.
        utterances: in the sample.
        rows: in the sample.
    """

    types: list[str]
    names: list[str]
    counts: np.ndarray
    means: np.ndarray
    cosines: tuple[float, float]
    utterances: int
    rows: int

    @property
    def directions(self) -> np.ndarray:
        """The means (N, D) at length one."""
        return _unit(self.means)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def average_types(
    store: LinguisticStore,
    tokens: dict[str, list[str]],
    names: dict[str, str],
    words: list[str],
    sample: int,
) -> TypeVectors:
    """Average the standardised rows of each of the most frequent tokens.

    Args:
        store: a store.
        tokens: of each of its utterances.
        names: how each token is shown.
        words: tokens that must be among them, if the store has them.
        sample: utterances to read, besides some that hold the words.

    Raises:
        CmktError: a corrupt store.
    """
    import torch

    from cmkt.transfer import Targets

    generator = random.Random(0)
    chosen = set(generator.sample(list(tokens), min(sample, len(tokens))))
    asked = {word.casefold() for word in words}
    named = {token for token, name in names.items() if _plain(name) in asked}
    seen = Counter()
    for utterance, line in tokens.items() if named else ():
        found = named.intersection(line)
        if any(seen[token] < OCCURRENCES for token in found):
            seen.update(found)
            chosen.add(utterance)
    counts = Counter(token for utterance in chosen for token in tokens[utterance])
    ranked = sorted(counts, key=lambda token: (token not in named, -counts[token], token))[:TYPES]
    types = sorted(ranked, key=lambda token: (-counts[token], token))
    mean, covariance = read_statistics(store.folder / STATISTICS)
    targets = Targets(len(mean), standardise=True)  # as training standardises
    targets.set_statistics(torch.from_numpy(mean), torch.from_numpy(covariance))
    scale = targets.scale.numpy()
    index = {token: number for number, token in enumerate(types)}
    sums = np.zeros((len(types), len(mean)))
    totals, rows = np.zeros((2, len(mean))), 0
    for utterance in sorted(chosen):
        matrix = _read(store, utterance, len(tokens[utterance]))  # (T_t, D)
        standardised = (matrix - mean) * scale
        totals += _unit(matrix).sum(0), _unit(standardised).sum(0)
        rows += len(matrix)
        numbers = np.array([index.get(token, -1) for token in tokens[utterance]])
        np.add.at(sums, numbers[numbers >= 0], standardised[numbers >= 0])
    numbers = np.array([counts[token] for token in types])
    # |sum of n unit vectors|^2 is n plus twice the cosines of all pairs.
    cosines = tuple((total @ total - rows) / max(rows * (rows - 1), 1) for total in totals)
    shown = [names[token] for token in types]
    return TypeVectors(types, shown, numbers, sums / numbers[:, None], cosines, len(chosen), rows)


def _names(tokens: dict[str, list[str]]) -> dict[str, str]:
    """Return how to show each token: tokens of bytes as the text they stand for."""
    from tokenizers.decoders import ByteLevel

    types = sorted({token for line in tokens.values() for token in line})
    # Only bytes of a byte-level tokenizer are UTF-8 when they are put together again.
    some = list(tokens.values())[:: max(len(tokens) // 1000, 1)]
    decode = ByteLevel().decode
    if any("\ufffd" in decode(line) for line in some):
        return dict(zip(types, types, strict=True))
    decoded = {token: decode([token]).replace(" ", SPACE) for token in types}
    return {t: t if "\ufffd" in name or not name.isprintable() else name
            for t, name in decoded.items()}  # fmt: skip


def _plain(name: str) -> str:
    return name.strip(SPACE).casefold()


def _neighbours(vectors: TypeVectors, words: list[str]) -> list[str]:
    """Return a line for each of the words, or for some tokens with a meaning of their own."""
    places = {}
    for number, name in enumerate(vectors.names):  # the most frequent first
        places.setdefault(_plain(name), number)
    chosen = [(word, places.get(word.casefold())) for word in words]
    if not words:
        # Vectors of function words follow their context, so their means lie near the middle.
        frequent = range(min(max(len(vectors.types) // 10, 50), len(vectors.types)))
        lengths = np.linalg.norm(vectors.means, axis=1)
        letters = [n for n in frequent if _plain(vectors.names[n]).isalpha()]
        best = sorted(letters or frequent, key=lambda number: -lengths[number])[:SHOWN]
        chosen = [(vectors.names[number], number) for number in best]
    width = max((_width(word) for word, _ in chosen), default=0)
    directions, lines = vectors.directions, []
    for word, number in chosen:
        found = "is no token of this store"
        if number is not None:
            cosines = directions @ directions[number]
            nearest = [n for n in np.argsort(-cosines) if n != number][:NEAREST]
            found = "  ".join(f"{vectors.names[n]} {cosines[n]:.2f}" for n in nearest)
        lines.append(f"{word}{' ' * (width - _width(word))}  {found}")
    return lines


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def draw_map(vectors: TypeVectors, path: Path) -> None:
    """Draw the tokens in the plane of their two principal components.

    Args:
        vectors: of the tokens.
        path: PNG to write.
    """
    # Its remarks on fonts and cache folders are not for the user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    centred = vectors.directions - vectors.directions.mean(0)
    values, axes = np.linalg.eigh(centred.T @ centred)  # eigenvalues ascend
    points = np.pad(centred @ axes[:, :-3:-1], ((0, 0), (0, max(2 - axes.shape[1], 0))))  # (N, 2)
    shares = np.pad(values[:-3:-1], (0, max(2 - len(values), 0))) / max(values.sum(), 1e-30)
    figure = Figure(figsize=(12, 9), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    colours = np.log10(vectors.counts)
    drawn = axis.scatter(*points.T, c=colours, s=8 + 12 * colours, cmap="viridis", alpha=0.5)
    figure.colorbar(drawn, ax=axis, label="log10 of the occurrences in the sample", aspect=50)
    axis.set_xlabel(f"first component, {100 * shares[0]:.1f} % of the variance")
    axis.set_ylabel(f"second component, {100 * shares[1]:.1f} % of the variance")
    axis.set_title(f"{len(vectors.types)} tokens, standardised, mean of their occurrences")
    figure.draw_without_rendering()
    families, without = _fonts(set("".join(vectors.names[:LABELS])))
    renderer, boxes = canvas.get_renderer(), []
    for name, point in list(zip(vectors.names, points, strict=True))[:LABELS]:
        if without.isdisjoint(name):
            label = axis.annotate(name, point, (3, 3), textcoords="offset points", fontsize=8,
                                  family=families, parse_math=False)  # fmt: skip
            box = label.get_window_extent(renderer)
            if box.count_overlaps(boxes):
                label.remove()
            else:
                boxes.append(Bbox(box))
    with atomic_file(path, "wb") as stream:
        # No version of matplotlib in the file: the same numbers give the same bytes.
        figure.savefig(stream, format="png", dpi=100, metadata={"Software": None})


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """Find installed fonts for some characters.

    Returns:
        names of font families to try in turn; the characters that none of them has.
    """
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    # The one that comes with matplotlib first.
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.name != "DejaVu Sans", font.name))
    families, missing = [], set(characters)
    for font in fonts:
        regular = (font.style, font.weight) == ("normal", 400)
        if missing and regular and font.name not in (*families, LAST_RESORT):
            found = {c for c in missing if ord(c) in FT2Font(font.fname).get_charmap()}
            if found:
                families.append(font.name)
                missing -= found
    return families or ["DejaVu Sans"], missing
