"""Time every alignment against the cross-modality transformer, and training steps with each.

    python benchmarks/alignment.py [--turns 7] [--only alignments|steps]

alignments  forward and backward of each alignment (8 utterances of 1000 frames and 60 tokens,
            widths 256 and 384), against the transformer's of width 128
steps       a whole training step of the egs/mini BLSTM with each, against the baseline's

All contenders take turns (A B C A B C ...), so a machine that slows down slows all; printed are the
median of the times and of the ratios within a turn. Peak memory is that of a process of its own for
each contender, after two runs.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import yaml
from training import REPOSITORY, build, step

from cmkt.transfer.alignment import ALIGNMENTS, build_alignment

PARTS = ("alignments", "steps")
VOCABULARIES = {"ctc": 500, "ctc, 5000 tokens": 5000}
UTTERANCES, FRAMES, TOKENS, ACOUSTIC_DIM, LINGUISTIC_DIM = 8, 1000, 60, 256, 384
# Largest ratios wanted: of an alignment to the transformer, and of a step to the baseline's.
ALIGNMENT_TARGETS = {"sinkhorn": 3.0, "ctc": 1.5, "integrate_and_fire": 1.5}
STEP_TARGETS = {"transformer": 1.10}
STEP_TARGET, MEMORY_TARGET = 1.3, 1.2
BASELINE, TRANSFORMER = "baseline", "transformer"


def alignment_run(name: str) -> Callable[[], float]:
    """Return what runs one alignment forward and backward and returns the seconds."""
    torch.manual_seed(0)
    kind, vocabulary = name.partition(",")[0], VOCABULARIES.get(name, 500)
    alignment = build_alignment({"type": kind}, ACOUSTIC_DIM, LINGUISTIC_DIM, vocabulary)
    acoustic = torch.randn(UTTERANCES, FRAMES, ACOUSTIC_DIM, requires_grad=True)
    text = torch.randn(UTTERANCES, TOKENS, LINGUISTIC_DIM)
    lengths = torch.full((UTTERANCES,), FRAMES), torch.full((UTTERANCES,), TOKENS)
    ids = torch.randint(vocabulary, (UTTERANCES, TOKENS))

    def run() -> float:
        acoustic.grad = None
        alignment.zero_grad()
        start = time.perf_counter()
        aligned = alignment(acoustic, lengths[0], text, lengths[1], ids)
        cosines = torch.nn.functional.cosine_similarity(aligned.zhat, text, dim=-1)
        loss = (1 - cosines).mean()
        for part in (aligned.loss, aligned.cost):
            if part is not None:
                loss = loss + part.mean()
        loss.backward()
        return time.perf_counter() - start

    return run


def step_run(name: str) -> Callable[[], float]:
    """Return what does one training step of the egs/mini BLSTM and returns the seconds."""
    torch.manual_seed(0)
    kind, vocabulary = name.partition(",")[0], VOCABULARIES.get(name, 500)
    path = REPOSITORY / "egs/mini/conf/train_blstm.yaml"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        if name != BASELINE:
            conf = yaml.safe_load(path.with_stem(f"{path.stem}_cmkt").read_text())
            # Statistics of the embeddings would need a corpus, and cost nothing to speak of.
            conf["transfer_conf"] |= {"standardise": False, "alignment": {"type": kind}}
            if kind == "ctc":
                conf["transfer_conf"]["vocabulary"] = vocabulary
            yaml.safe_dump(conf, file)
            file.flush()
            path = Path(file.name)
        model = build(path)
    optimizer = torch.optim.Adam(model.parameters())
    lengths = torch.randint(40000, 56001, (16,)).sort(descending=True)[0]
    tokens = torch.randint(6, 13, (16,))
    batch = {
        "speech_mix": 0.1 * torch.randn(16, 56000),
        "speech_mix_lengths": lengths,
        "speech_ref1": 0.1 * torch.randn(16, 56000),
        "speech_ref1_lengths": lengths,
        "linguistic": torch.randn(16, 12, LINGUISTIC_DIM),
        "linguistic_lengths": tokens,
        "token_ids": torch.randint(vocabulary, (16, 12)),
        "token_ids_lengths": tokens,
    }
    return lambda: step(model, optimizer, batch)


def resident(kind: str) -> float:
    """Return the memory of this process in MB: `VmRSS` now, `VmHWM` at most so far."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def measure_memory(prepare: Callable, name: str, threads: int) -> tuple[float, float]:
    """Return the peak memory of this process in MB, and how much of it two runs have added."""
    torch.set_num_threads(threads)
    run = prepare(name)
    start = resident("VmRSS")
    for _ in range(2):
        run()
    peak = resident("VmHWM")
    return peak, max(peak - start, 0.0)


def alone(*args) -> tuple[float, float]:
    """Call `measure_memory` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_memory, *args).result()


def compare(prepare: Callable, names: list[str], targets: dict, turns: int, threads: int) -> None:
    """Print a table of all contenders; the first is what the others are compared with."""
    memory = [alone(prepare, name, threads) for name in names]
    runs = [prepare(name) for name in names]
    for run in runs:
        run()  # warm-up
    times = [[run() for run in runs] for _ in range(turns)]
    print(f"| | ms | ratio to {names[0]} | wanted | peak MB | ratio | of it added by the run |")
    print("|---|---|---|---|---|---|---|")
    for n, name in enumerate(names):
        median = 1e3 * statistics.median(turn[n] for turn in times)
        ratio = statistics.median(turn[n] / turn[0] for turn in times)
        wanted = f"<= {targets[name]:g}" if name in targets else ""
        peak, added = memory[n]
        print(f"| {name} | {median:.0f} | {ratio:.2f} | {wanted} | {peak:.0f} | "
              f"{peak / memory[0][0]:.2f} | {added:.0f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="one part (default: both)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {os.cpu_count()} cores, load "
          f"average {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
    names = sorted({*ALIGNMENTS, *VOCABULARIES} - {TRANSFORMER})
    if args.only != "steps":
        print(f"\nForward and backward: B {UTTERANCES}, T_a {FRAMES}, T_t {TOKENS}, "
              f"D_a {ACOUSTIC_DIM}, D_t {LINGUISTIC_DIM}\n", flush=True)  # fmt: skip
        compare(alignment_run, [TRANSFORMER, *names], ALIGNMENT_TARGETS, args.turns, args.threads)
    if args.only != "alignments":
        print("\nTraining step of the egs/mini BLSTM, 16 utterances; peak memory at most "
              f"{MEMORY_TARGET:g} of the baseline's\n", flush=True)  # fmt: skip
        names = [TRANSFORMER, *names]
        targets = dict.fromkeys(names, STEP_TARGET) | STEP_TARGETS
        compare(step_run, [BASELINE, *names], targets, args.turns, args.threads)


if __name__ == "__main__":
    main()
