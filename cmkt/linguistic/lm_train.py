"""Train a small BERT-style language model on transcripts, where no pretrained one exists.

Reads a Kaldi `text` and writes a transformers folder that `cmkt embed` takes like any other:
config.json, model.safetensors, the files of a fast tokenizer, and meta.yaml: what the model was
trained on and how well it guesses masked tokens of lines that it has not seen, beside always
guessing the most frequent token (the unigram baseline).

--llm_config is a YAML such as conf/llm/own.yaml. Its normaliser is applied to the text, its
`model` is the output folder, and its `lm_train` may hold any of the options below but --text,
--output_dir and --device; an option given here goes before it.

A model of this kind knows nothing but the recipe's own text. Beside a pretrained one it separates
what the text's supervision brings from what the language model knows.
"""

import errno
import io
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from cmkt import __version__
from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.linguistic.config import LanguageModelConfig, read_config
from cmkt.linguistic.normalise import make_normaliser
from cmkt.stage import MARKER, Stage, atomic_file

VOCABULARIES = ("sentencepiece", "character")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
MASKED = 0.15  # share of the tokens
HELD_OUT = 0.05  # share of the different lines,
LEAST_HELD_OUT = 10  # but at least so many
PIECES = 500  # of sentencepiece, unless told otherwise
LEAST_LINES = 50  # different ones
MOST_POSITIONS = 512  # tokens of a line, [CLS] and [SEP] included
EVALUATED = 64  # lines at once
UNSEEN = -100  # label of a position that is not guessed, as transformers has it


@dataclass(frozen=True)
class TrainingOptions:
    """What `lm_train` of a language-model YAML may say.

    Args:
        vocabulary: `sentencepiece` (a unigram model) or `character`.
        vocab_size: most tokens, special ones included; 0 means 500 pieces or every character.
        hidden_size: width, the dimension of the features.
        layers: number of transformer layers.
        heads: attention heads of a layer.
        max_steps: training steps.
        batch_size: lines of a step.
        learning_rate: highest one, after the warm-up.
        seed: of the held-out lines, the initial weights, the order and the masks.
    """

    vocabulary: str = "sentencepiece"
    vocab_size: int = 0
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    max_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 0.001
    seed: int = 0

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
    default, add = TrainingOptions(), parser.add_argument
    add("--text", type=Path, required=True, help="Kaldi text: `<utterance> <transcript>` lines")
    add("--output_dir", type=Path, help="folder of the model (default: `model` of the YAML)")
    add("--llm_config", type=Path, help="language-model YAML, for example conf/llm/own.yaml")
    helps = {
        "vocabulary": "for languages with spaces, or for those without",
        "vocab_size": "most tokens; 0: 500 pieces, or every character",
        "hidden_size": "width, the dimension of the features",
        "layers": "transformer layers",
        "heads": "attention heads of a layer",
        "max_steps": "training steps",
        "batch_size": "lines of a step",
        "learning_rate": "highest one, after the warm-up",
        "seed": "of the held-out lines, the weights, the order and the masks",
    }
    for option in fields(TrainingOptions):
        text = f"{helps[option.name]} (default: the YAML's, or {getattr(default, option.name)})"
        choices = VOCABULARIES if option.name == "vocabulary" else None
        add(f"--{option.name}", type=option.type, choices=choices, help=text)
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
    device = _device(device)
    with stage.working_directory() as work:
        make = {"sentencepiece": sentencepiece_tokenizer, "character": character_tokenizer}
        tokenizer = make[options.vocabulary](training, options.vocab_size)
        encoded = [_encode(tokenizer, part) for part in (training, held_out)]
        model = _fit(encoded[0], tokenizer, options, device)
        scores = _evaluate(model, *encoded, device)
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
        f"{len(held_out)} held-out lines; the most frequent token is "
        f"{scores['unigram_accuracy']:.1%} of them"
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


def train_sentencepiece(lines: list[str], vocab_size: int = 0) -> bytes:
    """Train a sentencepiece unigram model with this module's special tokens.

    Args:
        lines: texts.
        vocab_size: most pieces, special tokens included; fewer if the text has not so many; 0
            means 500.

    Returns:
        the model as sentencepiece writes it.

    Raises:
        CmktError: the text has more characters than the vocabulary may have pieces.
    """
    import sentencepiece

    pad, unknown, begin, end, mask = SPECIAL
    model, wanted = io.BytesIO(), vocab_size or PIECES
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="unigram",
            vocab_size=wanted, hard_vocab_limit=False, normalization_rule_name="nfkc",
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols=[mask],
            pad_piece=pad, unk_piece=unknown, bos_piece=begin, eos_piece=end,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        characters = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if characters is None:
            raise
        raise CmktError(
            f"vocab_size: {wanted} pieces are too few for the text's characters",
            remedy=f"want at least {characters[1]}, or vocabulary: character",
        ) from error
    return model.getvalue()


def sentencepiece_tokenizer(lines: list[str], vocab_size: int = 0):
    """Make a fast tokenizer of a sentencepiece model that is trained on the lines.

    Args:
        lines: texts.
        vocab_size: see `train_sentencepiece`.

    Returns:
        a `PreTrainedTokenizerFast` that segments as sentencepiece does.

    Raises:
        CmktError: as `train_sentencepiece`.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = ModelProto.FromString(train_sentencepiece(lines, vocab_size))
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if len(pieces) < (vocab_size or PIECES):
        print(f"the text has {len(pieces)} pieces only, not the {vocab_size or PIECES} wanted")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_special_tokens(tokenizer)


def character_tokenizer(lines: list[str], vocab_size: int = 0):
    """Make a fast tokenizer of which each character but spaces is a token.

    Args:
        lines: texts.
        vocab_size: most tokens, special ones included: the most frequent characters; 0 means all.

    Returns:
        a `PreTrainedTokenizerFast`; a character that is not in the lines is [UNK].
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    counts = Counter(character for line in lines for character in "".join(line.split()))
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    most = vocab_size - len(SPECIAL) if vocab_size else len(frequent)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *frequent[:most]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    return _with_special_tokens(tokenizer)


def _with_special_tokens(tokenizer):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    pad, unknown, begin, end, mask = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, SPECIAL.index(begin)), (end, SPECIAL.index(end))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=begin,
        sep_token=end, mask_token=mask, model_max_length=MOST_POSITIONS,
    )  # fmt: skip


def _encode(tokenizer, lines: list[str]) -> list[list[int]]:
    return tokenizer(lines, truncation=True, max_length=MOST_POSITIONS)["input_ids"]


def _device(name: str):
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CmktError(f"device {name}: {reason}", remedy="try --device cpu") from error
    return torch.device(name)


def _fit(lines: list[list[int]], tokenizer, options: TrainingOptions, device):
    """Train a model to guess masked tokens.

    Args:
        lines: token ids, special ones included.
        tokenizer: that they are from.
        options: size, training and seed.
        device: a torch device.

    Returns:
        a `BertForMaskedLM` in evaluation mode.
    """
    import torch
    from tqdm import tqdm
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DataCollatorForLanguageModeling,
        get_linear_schedule_with_warmup,
    )

    torch.manual_seed(options.seed)
    # A position that no line reaches would stay random; 32 leave room for a prompt.
    positions = tokenizer.model_max_length = max(32, max(map(len, lines)))
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            intermediate_size=4 * options.hidden_size,
            max_position_embeddings=positions,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    warm_up = options.max_steps // 10
    scheduler = get_linear_schedule_with_warmup(optimizer, warm_up, options.max_steps)
    model.train()
    with tqdm(total=options.max_steps, desc="lm-train", unit="step", mininterval=0.5) as bar:
        while bar.n < options.max_steps:
            for batch in _epoch(lines, options.batch_size)[: options.max_steps - bar.n]:
                examples = [{"input_ids": lines[index]} for index in batch]
                inputs = collate(examples).to(device)
                loss = _losses(model, inputs["input_ids"], inputs["labels"])[0].mean()
                if not loss.isnan():  # a batch without a masked token has none
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                scheduler.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def _batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _epoch(lines: list[list[int]], batch_size: int) -> list[list[int]]:
    """Return the indices of all lines in random batches of similar lengths."""
    import torch

    order = sorted(torch.randperm(len(lines)).tolist(), key=lambda index: len(lines[index]))
    batches = _batches(order, batch_size)
    return [batches[index] for index in torch.randperm(len(batches)).tolist()]


def _losses(model, inputs, labels):
    """Return loss and correctness of each guessed token.

    Args:
        model: a `BertForMaskedLM`.
        inputs: (B, T) token ids.
        labels: (B, T) the right ones where a token is to be guessed, elsewhere `UNSEEN`.

    Returns:
        two tensors (guessed tokens,): cross-entropy in nats, whether the likeliest one is right.
    """
    from torch.nn.functional import cross_entropy

    attended = inputs != model.config.pad_token_id
    states = model.bert(input_ids=inputs, attention_mask=attended).last_hidden_state  # (B, T, D)
    guessed = labels != UNSEEN
    scores = model.cls(states[guessed])  # (guessed tokens, vocabulary)
    right = labels[guessed]
    return cross_entropy(scores, right, reduction="none"), scores.argmax(-1) == right


def _evaluate(model, training: list[list[int]], held_out: list[list[int]], device) -> dict:
    """Let the model guess every held-out token once, and a unigram model too.

    Args:
        model: a `BertForMaskedLM`.
        training: token ids of its training lines, special ones included.
        held_out: token ids of lines that it has not seen.
        device: of the model.

    Returns:
        loss (nats) and accuracy of both. Unknown tokens are not asked for.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    losses, right, asked = [], [], []
    stride = round(1 / MASKED)
    for batch in _batches(sorted(held_out, key=len), EVALUATED):
        ids = pad_sequence([torch.tensor(line) for line in batch], batch_first=True).to(device)
        position = torch.arange(ids.shape[1], device=device)
        for offset in range(stride):  # each masks as many tokens as in training
            chosen = (position % stride == offset) & (ids >= len(SPECIAL))
            labels = ids.masked_fill(~chosen, UNSEEN)
            with torch.inference_mode():
                loss, hit = _losses(model, ids.masked_fill(chosen, SPECIAL.index("[MASK]")), labels)
            losses.append(loss), right.append(hit), asked.append(ids[chosen])
    asked = torch.cat(asked).cpu()
    counts = torch.bincount(
        torch.tensor([token for line in training for token in line if token >= len(SPECIAL)]),
        minlength=model.config.vocab_size,
    )
    smoothed = (counts + 1.0) / (counts + 1.0)[len(SPECIAL) :].sum()
    return {
        "held_out_tokens": len(asked),
        "held_out_loss": round(torch.cat(losses).mean().item(), 4),
        "held_out_accuracy": round(torch.cat(right).float().mean().item(), 4),
        "unigram_loss": round(-smoothed[asked].log().mean().item(), 4),
        "unigram_accuracy": round((asked == counts.argmax()).float().mean().item(), 4),
    }
