"""Speed, memory and storage of `cmkt embed`, beside plain loops over the same model, in one run.

    python benchmarks/linguistic.py [--quick] [--only PART] [--text FILE ...]

Each measurement has a process of its own, so that its peak memory is its own; imports and a
warm-up come before the clock. The rivals only compute; `cmkt embed` also hashes and loads the
model, writes the store and reads it again. Contenders take turns (A B C D A B C D ...), so a
machine that slows down slows all; printed are medians, and medians of the ratios within a turn.
The ratios of CPU time, all threads and processes together, hold on a busy machine as well.
"""

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from cmkt.corpus.datadir import read_table, write_table
from cmkt.linguistic.config import LanguageModelConfig, read_config
from cmkt.linguistic.embed import REUSED

REPOSITORY = Path(__file__).resolve().parent.parent
MINILM = REPOSITORY / "conf" / "llm" / "minilm.yaml"
PARTS = ("throughput", "storage", "large")
BATCH = 32  # of the rival that does not sort


def real_transcripts(files: list[Path], count: int) -> tuple[list[str], str]:
    """Return English transcripts, and where they come from."""
    files = files or sorted(REPOSITORY.parent.glob("shared/data/en_*/text"))
    lines = [line for file in files for line in read_table(file).values()]
    from_files = len(lines)
    if len(lines) < count:
        sys.path.insert(0, str(REPOSITORY / "egs" / "mini" / "local"))
        from sentences import all_sentences

        lines += all_sentences(0, "en")
    lines = lines[:count]
    origin = f"{len(lines)} transcripts, {min(from_files, len(lines))} of them read speech"
    if len(lines) > from_files:
        origin += f" and {len(lines) - from_files} sentences of egs/mini"
    return random.Random(0).sample(lines, len(lines)), origin


def different_texts(lines: list[str], count: int) -> list[str]:
    """Return texts of the same words and lengths as the lines, no two the same."""
    generator = random.Random(0)
    words = " ".join(lines).lower().split()
    lengths = [max(len(line.split()), 4) for line in lines]
    made: dict[str, None] = {}
    while len(made) < count:
        made[" ".join(generator.choices(words, k=generator.choice(lengths)))] = None
    return list(made)


def write_text(path: Path, lines: list[str]) -> Path:
    """Write a Kaldi text."""
    write_table(path, {f"u{number:06}": line for number, line in enumerate(lines)})
    return path


def clock() -> tuple[float, float]:
    """Return seconds of the clock and of the CPU, that of ended child processes included."""
    return time.perf_counter(), sum(os.times()[:4])


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Return the seconds since a `clock`."""
    wall, cpu = clock()
    return wall - start[0], cpu - start[1]


def alone(function, *args) -> tuple[float, float, float]:
    """Run a function in a fresh process.

    Returns:
        the two numbers of seconds that it returns; peak memory in GB of the process, or of a
        process that it started if that had more.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, function, *args).result()


def _measured(function, *args) -> tuple[float, float, float]:
    seconds = function(*args) or (0.0, 0.0)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return *seconds, max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1e6


def rival(lines: list[str], threads: int, batch_size: int) -> tuple[float, float]:
    """Time a plain loop; with batches of one, each is padded to the longest of all texts."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from cmkt.linguistic.models import find_model

    torch.set_num_threads(threads)
    folder = find_model(read_config(MINILM).model).folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    longest = max(map(len, tokenizer(lines)["input_ids"]))
    padding = {"padding": "max_length", "max_length": longest} if batch_size == 1 else {
        "padding": True}  # fmt: skip
    matrices = []
    for timed in (lines[:50], lines):  # the first is the warm-up
        start = clock()
        with torch.inference_mode():
            for first in range(0, len(timed), batch_size):
                batch = timed[first : first + batch_size]
                encoded = tokenizer(batch, return_tensors="pt", **padding)
                hidden = model(**encoded).last_hidden_state  # (B, T, D)
                lengths = encoded["attention_mask"].sum(1).tolist()
                pairs = zip(hidden, lengths, strict=True)
                matrices += [rows[1 : length - 1].numpy().copy() for rows, length in pairs]
    return since(start)


def cmkt_embed(
    text: Path, output: Path, config: LanguageModelConfig, threads: int, nj: int = 1
) -> tuple[float, float]:
    """Time `cmkt embed`."""
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401

    from cmkt.linguistic.embed import embed

    torch.set_num_threads(threads)
    lines = list(read_table(text).values())[:50]
    with tempfile.TemporaryDirectory() as folder:
        warm = write_text(Path(folder) / "text", lines)
        embed(warm, Path(folder) / "store", config)
    start = clock()
    embed(text, output, config, nj=nj)
    return since(start)


def throughput(lines: list[str], turns: int, threads: int, work: Path) -> None:
    """Print utterances per second of the rivals and of `cmkt embed`."""
    text, config = write_text(work / "text", lines), read_config(MINILM)
    outputs = iter(range(1000))

    def ours(nj: int):
        output = work / f"store.{next(outputs)}"
        return alone(cmkt_embed, text, output, config, threads, nj)

    contenders = {
        "one by one, padded to the longest of all": partial(alone, rival, lines, threads, 1),
        f"unsorted batches of {BATCH}": partial(alone, rival, lines, threads, BATCH),
        f"cmkt embed, 1 process, {threads} threads": partial(ours, 1),
        "cmkt embed --nj 2, 1 thread each": partial(ours, 2),
    }
    measured = [[run() for run in contenders.values()] for _ in range(turns)]
    title = "one by one / unsorted"
    print(f"  {'':<40}{'utt/s':>7}{title:>24}{'same by CPU time':>20}{'peak':>10}")
    for number, name in enumerate(contenders):
        wall = statistics.median(turn[number][0] for turn in measured)
        ratios = []
        for kind in (0, 1):
            pair = (statistics.median(turn[base][kind] / turn[number][kind] for turn in measured)
                    for base in (0, 1))  # fmt: skip
            ratios.append(" / ".join(f"{ratio:.2f}" for ratio in pair))
        peak = max(turn[number][2] for turn in measured)
        print(f"  {name:<40}{len(lines) / wall:7.1f}{ratios[0]:>24}{ratios[1]:>20}{peak:>7.2f} GB",
              flush=True)  # fmt: skip


def compare_storage(lines: list[str], threads: int, work: Path) -> None:
    """Print size and cosine to float32 of the compressed stores."""
    import numpy as np

    from cmkt.linguistic.store import LinguisticStore

    text, stores = write_text(work / "text", lines), {}
    for storage in ("float32", "16bit", "8bit"):
        config = read_config(MINILM)
        config.storage = storage
        alone(cmkt_embed, text, work / storage, config, threads)
        stores[storage] = LinguisticStore(work / storage)
    size = {name: sum(store.meta["arks"].values()) for name, store in stores.items()}
    reference = stores.pop("float32")
    for name, store in stores.items():
        total = rows = 0
        for utterance, exact in reference.items():
            other = store[utterance]
            lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(other, axis=1)
            total, rows = total + ((exact * other).sum(1) / lengths).sum(), rows + len(exact)
        share, bytes_ = size[name] / size["float32"], size["float32"] / 1e6
        print(f"  {name}: {share:.3f} of the float32 bytes ({bytes_:.1f} MB), "
              f"mean cosine {total / rows:.6f}", flush=True)  # fmt: skip


def tiny_model(folder: Path) -> None:
    """Write a random BERT of width 32 with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from cmkt.linguistic.models import find_model

    tokenizer = AutoTokenizer.from_pretrained(find_model(read_config(MINILM).model).folder)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes)
    BertModel(config).save_pretrained(folder)


def hash_minilm() -> tuple[float, float]:
    """Time what a check of an unchanged store does with the weights of the model."""
    from cmkt.linguistic.models import find_model

    start = clock()
    model = find_model(read_config(MINILM).model)
    model.weights_sha256(), model.settings_sha256()
    return since(start)


def command(text: Path, output: Path, model: Path) -> tuple[float, float]:
    """Time the command `cmkt embed` from its start to its end."""
    words = ["embed", "--text", text, "--output_dir", output, "--model", model]
    start = clock()
    subprocess.run([sys.executable, "-m", "cmkt.cli", *map(str, words)], check=True,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    return since(start)


def large_corpus(lines: list[str], count: int, most: int, threads: int, work: Path) -> None:
    """Print how time and memory behave with a large corpus and a tiny model."""
    alone(tiny_model, work / "tiny")
    config = LanguageModelConfig(model=str(work / "tiny"))
    texts = different_texts(lines, most)
    peaks = {}
    for size in (1000, count, most):
        text = write_text(work / f"text.{size}", texts[:size])
        output = work / f"large.{size}"
        seconds, cpu, peaks[size] = alone(cmkt_embed, text, output, config, threads)
        print(f"  {size} different texts, tiny model: {seconds:.1f} s ({cpu:.1f} s of CPU), "
              f"peak {peaks[size]:.2f} GB, "
              f"{peaks[size] - peaks[1000]:.2f} above 1000 texts", flush=True)  # fmt: skip
    text, store, model = work / f"text.{count}", work / f"large.{count}", work / "tiny"
    # Interpreter and all included; the store was made with the same options.
    unchanged, cpu = sorted(command(text, store, model) for _ in range(3))[1]
    hashing, hashing_cpu, _ = alone(hash_minilm)
    print(f"  unchanged store of {count}: {unchanged:.2f} s ({cpu:.2f} s of CPU), and "
          f"{hashing:.2f} s ({hashing_cpu:.2f} s) to hash MiniLM", flush=True)  # fmt: skip
    changed = [f"once more {line}" if n % 100 == 0 else line
               for n, line in enumerate(texts[:count])]  # fmt: skip
    write_text(text, changed)
    seconds, cpu = command(text, store, model)
    places = read_table(store / "linguistic.scp").values()
    computed = sum(REUSED not in place for place in places)
    print(f"  1 % of {count} texts changed: {computed} computed, "
          f"{seconds:.1f} s ({cpu:.1f} s of CPU)", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--text", nargs="*", type=Path, default=[],
        help="Kaldi texts of English transcripts (default: those of ../shared, if there, and the "
        "sentences of egs/mini)")  # fmt: skip
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes; figures mean little")
    args = parser.parse_args()
    # A transcript count, a large corpus and a larger one.
    few, count, most = (200, 5000, 10000) if args.quick else (2000, 100_000, 300_000)
    lines, origin = real_transcripts(args.text, few)
    print(f"{origin}; {args.threads} threads, {os.cpu_count()} cores, load average "
          f"{os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for part in [args.only] if args.only else PARTS:
            print(part, flush=True)
            folder = work / part
            folder.mkdir()
            if part == "throughput":
                throughput(lines, 1 if args.quick else args.turns, args.threads, folder)
            elif part == "storage":
                compare_storage(lines, args.threads, folder)
            else:
                large_corpus(lines, count, most, args.threads, folder)


if __name__ == "__main__":
    main()
