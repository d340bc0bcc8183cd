"""Train a small recogniser on the recipe's own clean speech, for the criterion `mimic` (stage 4).

Reads spk1.scp (clean speech) and text of two mixture directories (stage 2) and writes a folder:
model.pth, and meta.yaml: what it was trained on, its sizes, and its loss and character error rate
on the validation set. Characters are those of the training transcripts, in lower case and without
punctuation, and without spaces in languages that have none between words. Utterances without a
transcript are left out. The features of an hour of speech take 46 MB of memory.

Training ends when the validation loss has not fallen for --patience epochs; the best epoch is kept.
Equal options and data make equal weights on one CPU.
"""

import math
import random
import unicodedata
from pathlib import Path

import yaml

from cmkt import __version__
from cmkt.corpus.audio import read_audio
from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.stage import MARKER, Stage, atomic_file

LEAST_UTTERANCES = 2
# Masked at random in training, twice an utterance each: so many bands, so many frames.
MASKED_BANDS, MASKED_FRAMES = 12, 20
COUNTS = {
    "max_epoch": (30, "most epochs"),
    "patience": (3, "epochs without a lower validation loss before it ends"),
    "batch_size": (16, "utterances of a step"),
    "width": (128, "of the hidden layers"),
    "blocks": (6, "residual convolutions"),
    "seed": (0, "of the weights, the order and the masks"),
}


def add_arguments(parser) -> None:
    """Add the options of `cmkt train-recogniser`."""
    add = parser.add_argument
    add("--train_dir", type=Path, required=True, help="mixture directory to train on (stage 2)")
    add("--valid_dir", type=Path, required=True, help="mixture directory to validate on (stage 2)")
    add("--output_dir", type=Path, required=True, help="folder of the recogniser")
    for name, (default, meaning) in COUNTS.items():
        add(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add("--learning_rate", type=float, default=0.002, help="of Adam (default: %(default)s)")
    add("--device", default="cpu", help="torch device, for example cuda (default: %(default)s)")


def run(args) -> None:
    """Run `cmkt train-recogniser`.

    Args:
        args: the options of `add_arguments`.

    Raises:
        CmktError: bad input, before any audio is read; `output_dir` is then as it was.
    """
    options = {name: getattr(args, name) for name in COUNTS}
    for name, value in options.items():
        if value < (least := 0 if name == "seed" else 1):
            raise CmktError(f"--{name} {value}, want at least {least}")
    if not 0 < args.learning_rate < math.inf:
        raise CmktError(f"--learning_rate {args.learning_rate}, want more than 0")
    options["learning_rate"] = args.learning_rate
    sets = {"train": args.train_dir, "valid": args.valid_dir}
    for folder in sets.values():
        if not folder.is_dir():
            raise CmktError("no mixture directory", folder, remedy="run stage 2")
    inputs = [folder / name for folder in sets.values() for name in (MARKER, "spk1.scp", "text")]
    stage = Stage(args.output_dir, inputs, options)
    if stage.is_done():
        print(f"{args.output_dir}: up to date")
        return
    if args.output_dir.exists() and not (args.output_dir / MARKER).exists():
        raise CmktError(
            "it is there already and no recogniser",
            args.output_dir,
            remedy="give another --output_dir, or remove it",
        )
    utterances = {name: read_utterances(folder) for name, folder in sets.items()}
    with stage.working_directory() as work:
        meta = train(utterances["train"], utterances["valid"], options, args.device, work)
        meta |= {name + "_dir": str(folder) for name, folder in sets.items()}
        with atomic_file(work / "meta.yaml") as stream:
            yaml.safe_dump(meta, stream, sort_keys=False, allow_unicode=True)
    print(
        f"{args.output_dir}: character error rate {meta['valid_character_error_rate']:.1%} on "
        f"{meta['valid_utterances']} validation utterances of clean speech "
        f"(epoch {meta['best_epoch']} of {meta['epochs']})"
    )


def read_utterances(folder: Path) -> list[tuple[str, str, str]]:
    """Return (utterance, audio file, text) of the clean speech that has a transcript.

    Args:
        folder: mixture directory.

    Raises:
        CmktError: no clean speech or no transcripts.
    """
    for name, what in (("spk1.scp", "clean speech"), ("text", "transcripts")):
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            raise CmktError(
                f"no {name}: a recogniser learns from clean speech and its transcripts, "
                f"and there is no {what}", folder
            )  # fmt: skip
    audio, texts = read_table(folder / "spk1.scp"), spoken(read_table(folder / "text"))
    found = [(key, audio[key], texts[key]) for key in audio if texts.get(key)]
    if len(found) < LEAST_UTTERANCES:
        raise CmktError(f"{len(found)} utterances with clean speech and a transcript", folder)
    return found


def spoken(texts: dict[str, str]) -> dict[str, str]:
    """Return transcripts in lower case, as letters, digits, apostrophes and single spaces."""
    from cmkt.linguistic.word_errors import is_unspaced

    space = "" if is_unspaced(texts.values()) else " "

    def plain(text: str) -> str:
        text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
        kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
        return space.join("".join(kept).split())

    return {key: plain(text) for key, text in texts.items()}


def train(training, validation, options: dict, device: str, folder: Path) -> dict:
    """Train a recogniser and write its weights.

    Args:
        training: (utterance, audio file, text) of the training set.
        validation: the same of the validation set.
        options: a value for each of `COUNTS`, and `learning_rate`.
        device: a torch device.
        folder: for model.pth.

    Returns:
        the contents of meta.yaml.

    Raises:
        CmktError: audio that cannot be read or has several rates, or a training that diverged.
    """
    import torch
    from tqdm import tqdm

    from cmkt.espnet_plugin.ctc import WEIGHTS, CtcRecogniser
    from cmkt.linguistic.models import check_device

    check_device(device)
    torch.manual_seed(options["seed"])
    generator = random.Random(options["seed"])
    _, fs = read_audio(training[0][1])
    characters = sorted({character for _, _, text in training for character in text})
    size = {"width": options["width"], "blocks": options["blocks"]}
    model = CtcRecogniser(characters, fs, **size).to(device)
    data = [_prepare(part, model, device) for part in (training, validation)]
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])
    halve = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    best, history = {"loss": math.inf, "epoch": 0}, []
    with tqdm(total=options["max_epoch"], desc="train-recogniser", unit="epoch") as bar:
        for epoch in range(1, options["max_epoch"] + 1):
            model.train()
            for batch in _batches(data[0], options["batch_size"], generator):
                loss = _loss(model, _masked(batch, generator))[0]
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
            loss, errors = evaluate(model, data[1], options["batch_size"])
            halve.step(loss)
            history.append(round(loss, 4))
            bar.set_postfix(valid_loss=f"{loss:.3f}", character_errors=f"{errors:.1%}")
            bar.update()
            if loss < best["loss"]:
                best = {"loss": loss, "epoch": epoch, "errors": errors}
                with atomic_file(folder / WEIGHTS, "wb") as stream:
                    torch.save(model.state_dict(), stream)
            elif epoch - best["epoch"] >= options["patience"]:
                break
    if not best["epoch"]:
        raise CmktError("the training diverged", remedy="lower the --learning_rate")
    return {
        "purpose": "the criterion mimic; trained on the recipe's own clean speech",
        "characters": characters,
        "sample_rate": fs,
        "size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_utterances": len(training),
        "train_seconds": round(sum(len(f) for f, *_ in data[0]) * model.hop / fs),
        "valid_utterances": len(validation),
        "valid_loss": history[best["epoch"] - 1],
        "valid_character_error_rate": round(best["errors"], 4),
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "valid_loss_by_epoch": history,
        **options,
        "cmkt_version": __version__,
    }


def _prepare(part, model, device) -> list[tuple]:
    """Return (features (F, mels), numbers of the characters, text) of each utterance."""
    import torch

    number = {character: n for n, character in enumerate(model.characters, 1)}
    prepared = []
    for _, path, text in part:
        audio, fs = read_audio(path)
        if fs != model.fs:
            raise CmktError(f"want {model.fs} Hz, as in the training set, not {fs} Hz", path)
        speech = torch.from_numpy(audio)[None].to(device)
        features, frames = model.features(speech, torch.tensor([len(audio)], device=device))
        wanted = [number[character] for character in text if character in number]
        length = max(1, frames.item())  # half precision: all of them stay in memory
        prepared.append((features[0, :length].half().cpu(), wanted, text))
    return prepared


def _batches(data: list[tuple], size: int, generator: random.Random | None = None):
    """Yield batches of utterances of similar lengths; in random order with a generator."""
    order = list(range(len(data)))
    if generator:
        generator.shuffle(order)
    order.sort(key=lambda index: len(data[index][0]) // 20)
    starts = list(range(0, len(order), size))
    if generator:
        generator.shuffle(starts)
    for start in starts:
        yield [data[index] for index in order[start : start + size]]


def _masked(batch: list[tuple], generator: random.Random) -> list[tuple]:
    """Set some bands and some frames of each utterance to zero (SpecAugment, 1904.08779)."""

    def place(most: int, length: int) -> slice:
        width = generator.randint(0, min(most, length // 2))
        start = generator.randint(0, length - width)
        return slice(start, start + width)

    masked = []
    for features, wanted, text in batch:
        features = features.clone()
        for _ in range(2):
            features[:, place(MASKED_BANDS, features.shape[1])] = 0
            features[place(MASKED_FRAMES, features.shape[0])] = 0
        masked.append((features, wanted, text))
    return masked


def _loss(model, batch: list[tuple]):
    """Return CTC loss in nats a character, scores (B, T, 1 + characters) and valid frames (B,)."""
    import torch
    from torch.nn.functional import ctc_loss
    from torch.nn.utils.rnn import pad_sequence

    device = model.exit.weight.device
    features = pad_sequence([f.float() for f, *_ in batch], batch_first=True).to(device)
    frames = torch.tensor([len(features) for features, *_ in batch], device=device)
    scores, frames = model.score(features, frames)
    lengths = torch.tensor([len(wanted) for _, wanted, _ in batch])
    targets = torch.tensor([number for _, wanted, _ in batch for number in wanted])
    logarithms = scores.log_softmax(-1).transpose(0, 1)  # (T, B, 1 + characters)
    # An utterance with fewer frames than characters has an infinite loss: it teaches nothing.
    # On the CPU, where it is deterministic.
    losses = ctc_loss(
        logarithms.cpu(), targets, frames.cpu(), lengths, reduction="sum", zero_infinity=True
    )
    return losses / max(1, len(targets)), scores, frames


def evaluate(model, data: list[tuple], batch_size: int) -> tuple[float, float]:
    """Return the loss in nats a character, and the character error rate of greedy decoding."""
    import jiwer
    import torch

    model.eval()
    total, characters, wanted, found = 0.0, 0, [], []
    with torch.inference_mode():
        for batch in _batches(data, batch_size):
            loss, scores, frames = _loss(model, batch)
            count = sum(len(numbers) for _, numbers, _ in batch)
            total, characters = total + loss.item() * count, characters + count
            found += model.decode(scores, frames)
            wanted += [text for *_, text in batch]
    loss = total / max(1, characters)
    return (loss if math.isfinite(loss) else math.inf), float(jiwer.cer(wanted, found))
