"""Write a recipe for a corpus of your own: egs/NAME/{run.sh,local/data.sh,README.md}.

--kind folder   any folder of clean speech (cmkt.corpus.folder); needs nothing else
--kind kaldi    Kaldi data directories, clean, or noisy with a clean reference (cmkt.corpus.kaldi)
--kind python   a reader of your own: local/prepare.py, which works and waits to be adapted

What is not given is asked for in a terminal. Run from within the checkout; nothing that exists is
overwritten. See docs/new_corpus.md.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cmkt.errors import CmktError

KINDS = ("folder", "kaldi", "python")
LANGUAGES = ("en", "zh")

RUN = """\
#!/usr/bin/env bash
# Settings of the @name@ recipe; the stages are in ../../run.sh. Options on the command line win.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/../../run.sh" --recipe_dir "$here" \\
@settings@
    --train_set train --valid_set valid --test_sets test \\
    --train_snr -5:10 --valid_snr -5:10 --test_snr -5,0,5,10 "$@"
"""

DATA = """\
#!/usr/bin/env bash
# Stage 1: the corpus as it lies on disk -> data/{train,valid,test}
set -euo pipefail
exec python3 @reader@ "$@"
"""
READERS = {
    "folder": "-m cmkt.corpus.folder",
    "kaldi": "-m cmkt.corpus.kaldi",
    "python": '"$(dirname "${BASH_SOURCE[0]}")/prepare.py"',
}

README = """\
# @name@

@description@

| | |
|---|---|
| source | |
| licence | |
| size | |
| language | @language@ |
| sampling rate of the models | @fs@ Hz |

```bash
egs/@name@/run.sh
```

Speech: `@speech_dir@`. Noise: @noise@. Other places: `--corpus_dir`, `--noise_dir`.
@text@
## Expected tree

@tree@
"""
TREES = {
    "folder": "As in [egs/folder](../folder/README.md): audio at any depth, speakers in folders, "
    "transcripts beside the audio.",
    "kaldi": "As in [egs/kaldi_dir](../kaldi_dir/README.md).",
    "python": "What [local/prepare.py](local/prepare.py) reads.",
}
MANDARIN_TEXT = """
The language model is one trained on the transcripts (`conf/llm/own_character.yaml`), which needs
`pip install "cmkt[mandarin]"`; others: `--llm_config`, see [docs/text.md](../../docs/text.md).
"""

# Works as it stands: a speaker is the folder that a file lies in.
PREPARE = '''\
"""Turn @name@ into Kaldi data directories: data/train, data/valid and data/test."""

import argparse
import sys
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.corpus.recipe import Corpus, run_recipe
from cmkt.corpus.split import split_off
from cmkt.errors import CmktError

# What an error about a missing or wrong --corpus_dir tells.
CORPUS = Corpus(
    name="@name@",
    source="where it comes from, and its licence",
    tree="""\\
    DIR/
        <speaker>/<utterance>.wav    (or .flac)
        transcripts.txt              (optional: <speaker>-<utterance> WORDS, sorted)""",
    # Narrow it to what only this corpus has, such as "wav/train": then the folder is also found
    # from one above or below it.
    landmark="**",
)


def read_corpus(root: Path) -> DataDirectory:
    """Read all utterances. Pairs: `data.wav` is the noisy file, `data.spk1` the clean one."""
    data = DataDirectory({}, {})
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() not in (".wav", ".flac"):
            continue
        # An id starts with its speaker and has neither blanks nor slashes.
        speaker = "_".join(path.parent.name.split())
        utterance = f"{speaker}-{'_'.join(path.stem.split())}"
        if utterance in data.wav:
            what = f"would be the utterance {utterance}, as {data.wav[utterance]}"
            raise CmktError(what, path, remedy="rename one of the two")
        # A part of a longer recording: cmkt.corpus.recipe.Segment(str(path), start, end).
        data.wav[utterance] = str(path)
        data.utt2spk[utterance] = speaker
    transcripts = root / "transcripts.txt"
    if transcripts.exists():
        for line, (utterance, words) in enumerate(read_table(transcripts).items(), 1):
            if utterance not in data.wav:
                what = f"no audio of utterance {utterance}"
                raise CmktError(what, transcripts, line, "add it or remove the line")
            data.text[utterance] = words
    return data


def read_sets(root: Path, args: argparse.Namespace) -> dict[str, DataDirectory]:
    """Read all sets. An official split: return {"train": ..., "valid": ..., "test": ...}."""
    return split_off({"train": read_corpus(root)}, ["test", "valid"], root)


if __name__ == "__main__":
    sys.exit(run_recipe(CORPUS, read_sets, __doc__))
'''


@dataclass(frozen=True)
class Recipe:
    """What a recipe skeleton is made from.

    Args:
        name: of the folder in egs/, `[a-z0-9_]+`.
        kind: one of `KINDS`.
        speech_dir: the corpus.
        noise_dir: the noise; None for pairs.
        language: one of `LANGUAGES`.
        fs: sampling rate of the models in Hz.
        description: one line for the README.
    """

    name: str
    kind: str
    speech_dir: Path
    noise_dir: Path | None
    language: str
    fs: int
    description: str


def render(recipe: Recipe) -> dict[str, str]:
    """Return {path in the recipe's folder: content}."""
    settings = [("--corpus_dir", recipe.speech_dir), ("--fs", recipe.fs)]
    if recipe.noise_dir:
        settings.insert(1, ("--noise_dir", recipe.noise_dir))
    if recipe.language == "zh":
        settings += [("--lang", "zh"), ("--llm_config", "conf/llm/own_character.yaml")]
    values = {
        "name": recipe.name,
        "settings": "\n".join(f"    {key} {shlex.quote(str(v))} \\" for key, v in settings),
        "reader": READERS[recipe.kind],
        "description": recipe.description,
        "language": recipe.language,
        "fs": recipe.fs,
        "speech_dir": recipe.speech_dir,
        "noise": f"`{recipe.noise_dir}`" if recipe.noise_dir else "none, the data are pairs",
        "text": MANDARIN_TEXT if recipe.language == "zh" else "",
        "tree": TREES[recipe.kind],
    }

    def fill(template: str) -> str:
        return re.sub(r"@(\w+)@", lambda match: str(values[match[1]]), template)

    files = {"run.sh": fill(RUN), "local/data.sh": fill(DATA), "README.md": fill(README)}
    if recipe.kind == "python":
        files["local/prepare.py"] = fill(PREPARE)
    return files


def find_egs(start: Path) -> Path:
    """Find the folder `egs` of the checkout that a folder lies in.

    Raises:
        CmktError: not in a checkout.
    """
    for folder in (start, *start.parents):
        if (folder / "run.sh").is_file() and (folder / "egs").is_dir():
            return folder / "egs"
    remedy = "change to the checkout or give --egs_dir"
    raise CmktError("no checkout of cmkt (run.sh and egs/) here or above", start, remedy=remedy)


def write(recipe: Recipe, egs: Path) -> Path:
    """Write a recipe, wholly or not at all.

    Args:
        recipe: what to write.
        egs: folder of the recipes; the stages' run.sh lies beside it.

    Returns:
        the recipe's folder, which must not have been there.
    """
    folder = egs / recipe.name
    work = egs / f".{recipe.name}.{os.getpid()}.tmp"
    try:
        for name, content in render(recipe).items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            if path.suffix == ".sh":
                path.chmod(0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _answer(
    option: str, given: str | None, question: str, default: str | None, check: Callable
) -> object:
    """Return a checked answer: of the command line, of a dialogue, or the default."""
    if given is None and sys.stdin.isatty():
        try:
            shown = f" [{default}]" if default else " (none: leave empty)" if default == "" else ""
            given = input(f"{question}{shown}: ").strip() or default
        except EOFError:
            print()
    given = default if given is None else given
    if given is None:
        raise CmktError(f"{question}? It was not given", remedy=f"give {option}")
    try:
        return check(given)
    except ValueError as error:
        raise CmktError(f"{option} {given!r}: {error}") from error


def _choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    def check(answer: str) -> str:
        if answer not in choices:
            raise ValueError(f"want one of {', '.join(choices)}")
        return answer

    return check


def _existing(answer: str) -> Path:
    path = Path(answer).expanduser().absolute()
    if not answer or not path.exists():
        raise ValueError(f"no such folder: {path}")
    return path


def _rate(answer: str) -> int:
    if not re.fullmatch(r"[1-9]\d{3,5}", str(answer)):
        raise ValueError("want a sampling rate in Hz, for example 16000")
    return int(answer)


def ask(args) -> Recipe:
    """Make a recipe of the options, and of answers to questions about what was not given.

    Raises:
        CmktError: an answer is missing or cannot be; names the option.
    """
    kind = _answer("--kind", args.kind, f"Kind ({', '.join(KINDS)})", "folder", _choice(KINDS))
    speech = _answer("--speech_dir", args.speech_dir, "Folder of the speech", None, _existing)
    pairs_possible = kind != "folder"
    noise = _answer(
        "--noise_dir",
        args.noise_dir,
        "Folder of the noise",
        "" if pairs_possible else None,
        lambda answer: None if pairs_possible and not answer else _existing(answer),
    )
    if noise and not pairs_possible and noise.resolve().is_relative_to(speech.resolve()):
        remedy = "move it out, or give the folder beside it that holds the speech"
        raise CmktError("the noise lies in the speech folder", noise, remedy=remedy)
    return Recipe(
        name=args.name,
        kind=kind,
        speech_dir=speech,
        noise_dir=noise,
        language=_answer("--lang", args.lang, "Language (en, zh)", "en", _choice(LANGUAGES)),
        fs=_answer("--fs", args.fs, "Sampling rate of the models in Hz", "16000", _rate),
        description=_answer(
            "--description",
            args.description,
            "Description, one line",
            "Speech enhancement on a corpus of our own.",
            lambda answer: " ".join(answer.split()),
        ),
    )


def add_arguments(parser) -> None:
    """Add the options of `cmkt new-recipe`."""
    parser.add_argument("name", metavar="NAME", help="of the recipe: egs/NAME")
    parser.add_argument("--speech_dir", help="the corpus as it lies on disk")
    parser.add_argument("--noise_dir", help="a tree of noise files, or a wav.scp; none for pairs")
    parser.add_argument("--kind", help=f"{', '.join(KINDS)} (default folder)")
    parser.add_argument("--lang", help=f"{', '.join(LANGUAGES)} (default en)")
    parser.add_argument("--fs", help="sampling rate of the models in Hz (default 16000)")
    parser.add_argument("--description", help="one line for the README")
    parser.add_argument("--egs_dir", type=Path, help="(default: egs/ of the checkout around here)")


def run(args) -> None:
    """Run `cmkt new-recipe` with parsed arguments."""
    egs = args.egs_dir.absolute() if args.egs_dir else find_egs(Path.cwd())
    if not (egs / ".." / "run.sh").is_file():
        raise CmktError("no run.sh beside it", egs, remedy="--egs_dir is egs/ of a checkout")
    if not re.fullmatch("[a-z0-9_]+", args.name):
        raise CmktError(f"NAME {args.name!r}", remedy="want small letters, digits, underscores")
    if (egs / args.name).exists():
        raise CmktError("exists already", egs / args.name, remedy="take another name")
    folder = write(ask(args), egs)
    command = os.path.relpath(folder / "run.sh")
    print(f"{folder}: written. Prepare and mix the data:\n{shlex.quote(command)} --stop_stage 2")
