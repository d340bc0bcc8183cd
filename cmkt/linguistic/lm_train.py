"""Train a small BERT-style language model on transcripts, where no pretrained one exists.

Reads a Kaldi `text` and writes a transformers folder that `cmkt embed` takes like any other:
config.json, model.safetensors, the files of a fast tokenizer, and meta.yaml: what the model was
trained on and how well it guesses masked tokens of lines that it has not seen (5 % of them),
beside always guessing the most frequent token (the unigram baseline). Of a line of more than 510
tokens the rest is not used. Equal options and texts make equal weights on one CPU.

--llm_config is a YAML such as conf/llm/own.yaml. Its normaliser is applied to the text, its
`model` is the output folder, and its `lm_train` may hold any of the options below but --text,
--output_dir and --device; an option given here goes before it.

A model of this kind knows nothing but the recipe's own text. Beside a pretrained one it separates
what the text's supervision brings from what the language model knows.
"""

import errno
import math
import random
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

from cmkt import __version__
from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.linguistic.config import LanguageModelConfig, read_config
from cmkt.linguistic.masked_lm import evaluate, fit
from cmkt.linguistic.models import check_device
from cmkt.linguistic.normalise import make_normaliser
from cmkt.linguistic.vocabulary import (
    MOST_POSITIONS,
    SPECIAL,
    character_tokenizer,
    sentencepiece_tokenizer,
)
from cmkt.stage import MARKER, Stage, atomic_file

VOCABULARIES = ("sentencepiece", "character")
HELD_OUT = 0.05  # share of the different lines,
LEAST_HELD_OUT = 10  # but at least so many
LEAST_LINES = 50  # different ones


def _option(default, meaning: str):
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainingOptions:
    """What `lm_train` of a language-model YAML may say; each is an option of the command too."""

    vocabulary: str = _option("sentencepiece", "pieces of words, or characters")
    vocab_size: int = _option(0, "most tokens; 0: 500 pieces, or every character")
    hidden_size: int = _option(128, "width, the dimension of the features")
    layers: int = _option(4, "transformer layers")
    heads: int = _option(4, "attention heads of a layer")
    max_steps: int = _option(2000, "training steps")
    batch_size: int = _option(32, "lines of a step")
    learning_rate: float = _option(0.001, "highest one, after the warm-up")
    seed: int = _option(0, "of the held-out lines, the weights, the order and the masks")

    def __post_init__(self):
        if self.vocabulary not in VOCABULARIES:
            named = ", ".join(VOCABULARIES)
            raise CmktError(f"vocabulary: {self.vocabulary!r} is not one of {named}")
        for option in fields(self):
            value = getattr(self, option.name)
            least = 0 if option.name in ("vocab_size", "seed") else 1
            if option.type is int and value < least:
                raise CmktError(f"{option.name}: {value}, want at least {least}")
        if 0 < self.vocab_size <= len(SPECIAL):
            raise CmktError(f"vocab_size: {self.vocab_size}, want more than {len(SPECIAL)}")
        if self.learning_rate <= 0:
            raise CmktError(f"learning_rate: {self.learning_rate}, want more than 0")
        if self.hidden_size % self.heads:
            raise CmktError(f"hidden_size: {self.hidden_size} is no multiple of {self.heads} heads")


def add_arguments(parser) -> None:
    """Add the options of `cmkt lm-train`."""
    add = parser.add_argument
    add("--text", type=Path, required=True, help="Kaldi text: `<utterance> <transcript>` lines")
    add("--output_dir", type=Path, help="folder of the model (default: `model` of the YAML)")
    add("--llm_config", type=Path, help="language-model YAML, for example conf/llm/own.yaml")
    for option in fields(TrainingOptions):
        meaning = f"{option.metadata['help']} (default: the YAML's, or {option.default})"
        choices = VOCABULARIES if option.name == "vocabulary" else None
        add(f"--{option.name}", type=option.type, choices=choices, help=meaning)
    add("--device", default="cpu", help="torch device, for example cuda (default: %(default)s)")


def run(args) -> None:
    """Run `cmkt lm-train`.

    Args:
        args: the options of `add_arguments`.

    Raises:
        CmktError: bad input.
    """
    config = read_config(args.llm_config) if args.llm_config else LanguageModelConfig()
    values = {}
    if config.lm_train:
        values = _checked(config.lm_train, args.llm_config)
    names = [option.name for option in fields(TrainingOptions)]
    values |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    output_dir = args.output_dir
    if output_dir is None:
        if not config.lm_train:  # its model is somebody else's
            raise CmktError("no folder for the model", args.llm_config, remedy="give --output_dir")
        output_dir = Path(config.model).expanduser()
    options = TrainingOptions(**values)
    train(args.text, output_dir, options, config.normaliser, config.normaliser_conf, args.device)


def _checked(values: dict, path: Path) -> dict:
    """Refuse unknown keys and wrong types and values in the `lm_train` of a YAML."""
    kinds = {option.name: option.type for option in fields(TrainingOptions)}
    root = yaml.compose(path.read_text(encoding="utf-8"))
    mapping = next(value for key, value in root.value if key.value == "lm_train")
    lines = {key.value: key.start_mark.line + 1 for key, _ in mapping.value}
    for key, value in values.items():
        if key not in kinds:
            known = f"known keys: {', '.join(kinds)}"
            raise CmktError(f"lm_train: unknown key {key}", path, lines.get(str(key)), known)
        # `type`, because True is an int; 1 is a learning rate, though a high one.
        if type(value) not in ((int, float) if kinds[key] is float else (kinds[key],)):
            wanted = {int: "a whole number", float: "a number like 0.001", str: "text"}[kinds[key]]
            raise CmktError(f"lm_train: {key}: {value!r} is not {wanted}", path, lines[key])
    try:
        TrainingOptions(**values)
    except CmktError as error:
        line = lines.get(str(error).partition(":")[0])
        raise CmktError(f"lm_train: {error}", path, line) from error
    return values


def train(
    text: str | Path,
    output_dir: str | Path,
    options: TrainingOptions = TrainingOptions(),  # noqa: B008  frozen
    normaliser: str = "none",
    normaliser_conf: dict | None = None,
    device: str = "cpu",
) -> None:
    """Make a language model of transcripts.

    Args:
        text: transcripts, a Kaldi table.
        output_dir: folder of the model.
        options: size, training and seed.
        normaliser: of the transcripts, see `cmkt.linguistic.normalise`.
        normaliser_conf: its options.
        device: a torch device.

    Raises:
        CmktError: bad input; nothing is changed in `output_dir`.
        OSError: for example no space left; nothing is changed in `output_dir`.
    """
    from transformers.utils import logging

    text, output_dir = Path(text), Path(output_dir)
    told = {**asdict(options), "normaliser": normaliser, "normaliser_conf": normaliser_conf or {}}
    stage = Stage(output_dir, [text], told)
    if stage.is_done():
        print(f"{output_dir}: up to date")
        return
    if output_dir.exists() and not (output_dir / MARKER).exists():
        raise CmktError(
            "it is there already and no model of cmkt lm-train",
            output_dir,
            remedy="give another --output_dir, or remove it",
        )
    lines = _read_lines(text, make_normaliser(normaliser, normaliser_conf or {}))
    training, held_out = split_lines(lines, options.seed)
    check_device(device)
    make = {"sentencepiece": sentencepiece_tokenizer, "character": character_tokenizer}
    with stage.working_directory() as work:
        tokenizer = make[options.vocabulary](training, options.vocab_size)
        encoded = [_encode(tokenizer, part) for part in (training, held_out)]
        model = fit(encoded[0], tokenizer, options, device)
        scores = evaluate(model, *encoded, device)
        if not math.isfinite(scores["held_out_loss"]):
            raise CmktError("the training diverged", remedy="lower the learning_rate")
        logging.disable_progress_bar()
        try:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        except Exception as error:  # safetensors and tokenizers have their own each
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, "no space left", str(work)) from error
            raise
        meta = {
            "text": str(text),
            "lines": len(training),
            "tokens": sum(len(line) - 2 for line in encoded[0]),
            "held_out_lines": len(held_out),
            **scores,
            **told,
            "vocab_size": len(tokenizer),
            "cmkt_version": __version__,
        }
        with atomic_file(work / "meta.yaml") as stream:
            yaml.safe_dump(meta, stream, sort_keys=False, allow_unicode=True)
    print(
        f"{output_dir}: guesses {scores['held_out_accuracy']:.1%} of the masked tokens of "
        f"{len(held_out)} held-out lines, the unigram baseline {scores['unigram_accuracy']:.1%}"
    )
    if scores["held_out_loss"] >= scores["unigram_loss"]:
        print(
            f"warning: on held-out lines its loss ({scores['held_out_loss']} nats) is no better "
            f"than that of token frequencies ({scores['unigram_loss']}): "
            "too little text, or too few steps"
        )


def _read_lines(path: Path, normalise) -> list[str]:
    if path.exists() and path.stat().st_size == 0:
        raise CmktError("no transcripts", path, remedy="a language model needs some")
    normal = (normalise(line) for line in read_table(path).values())
    lines = [line for line in normal if line.strip()]
    different = len(set(lines))
    if different < LEAST_LINES:
        raise CmktError(
            f"{different} different lines after normalisation: too little to learn from",
            path,
            remedy=f"give at least {LEAST_LINES} lines, or a pretrained language model",
        )
    return lines


def split_lines(lines: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Hold lines out of the training.

    Args:
        lines: texts; all copies of one stay on one side.
        seed: which lines they are.

    Returns:
        the training lines, with their copies, and the held-out ones, each once.
    """
    different = list(dict.fromkeys(lines))
    count = max(LEAST_HELD_OUT, round(HELD_OUT * len(different)))
    held_out = random.Random(seed).sample(different, count)
    away = set(held_out)
    return [line for line in lines if line not in away], held_out


def _encode(tokenizer, lines: list[str]) -> list[list[int]]:
    return tokenizer(lines, truncation=True, max_length=MOST_POSITIONS)["input_ids"]
