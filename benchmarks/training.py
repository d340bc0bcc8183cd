"""Time the training step of CMKT against its baseline, and the exports with one thread, in one run.

    python benchmarks/training.py [--pairs 5] [--only steps|exports] [CONFIG ...]

A CONFIG is a baseline's YAML with a twin `*_cmkt.yaml` beside it. Steps of the two alternate
(A B A B ...), so a machine that slows down slows both; printed are the medians and the median of
the pairwise ratio. The real-time factor is that of the enhancement model alone on 4 s of noise.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = ["blstm_sum", "bsrnn", "dense_dual_path", "mp_senet"]
EXPORTS = ["gtcrn", "mp_senet_small"]
RATE = 16000


def build(path: Path, *options: str):
    """Build the model of a YAML, with further options, as `cmkt train` does."""
    from cmkt.espnet_plugin.task import TransferEnhancementTask
    from cmkt.espnet_plugin.train import _parse

    command = ["--config", str(path), "--output_dir", "x", *options]
    args = _parse(TransferEnhancementTask, command, path)
    # Without the statistics of a corpus, which standardised targets would need.
    args.transfer_conf = {**args.transfer_conf, "linguistic_dim": 384, "standardise": False}
    return TransferEnhancementTask.build_model(args).train()


def make_batch(utterances: int, seconds: float) -> dict:
    """Make noise in place of utterances of `seconds` at most, with 3 tokens a second."""
    samples, tokens = int(seconds * RATE), max(2, int(3 * seconds))
    shortest = int(0.7 * samples)
    lengths = torch.randint(shortest, samples + 1, (utterances,)).sort(descending=True)[0]
    lengths[0] = samples
    return {
        "speech_mix": 0.1 * torch.randn(utterances, samples),
        "speech_mix_lengths": lengths,
        "speech_ref1": 0.1 * torch.randn(utterances, samples),
        "speech_ref1_lengths": lengths,
        "linguistic": torch.randn(utterances, tokens, 384),
        "linguistic_lengths": torch.randint(tokens // 2, tokens + 1, (utterances,)),
    }


def step(model, optimizer, batch) -> float:
    """Run one update and return its time in seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss, _, _ = model(**batch)
    loss.sum().backward()
    optimizer.step()
    return time.perf_counter() - start


def time_steps(path: Path, batch: dict, pairs: int) -> None:
    """Print the step times of a baseline and its twin."""
    pair = [build(path), build(path.with_stem(path.stem + "_cmkt"))]
    optimizers = [torch.optim.Adam(model.parameters()) for model in pair]
    for model, optimizer in zip(pair, optimizers, strict=True):
        step(model, optimizer, batch)  # warm-up
    times = [[step(m, o, batch) for m, o in zip(pair, optimizers, strict=True)]
             for _ in range(pairs)]  # fmt: skip
    base, twin = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(f"{path.stem}: baseline {base:.3f} s, CMKT {twin:.3f} s, median ratio {ratio:.3f}",
          flush=True)  # fmt: skip


def time_export(path: Path, turns: int) -> None:
    """Print the real-time factor of the enhancement model of a YAML."""
    from cmkt.espnet_plugin.build import build_enhancement_model
    from cmkt.espnet_plugin.info import SECONDS, count_macs_per_second, read_config, run_model

    config = read_config(path)
    model = build_enhancement_model(config).eval()
    speech = 0.1 * torch.randn(1, SECONDS * RATE)

    def enhance() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            run_model(model, speech, RATE)
        return (time.perf_counter() - start) / SECONDS

    enhance()  # warm-up
    factor = statistics.median(enhance() for _ in range(turns))
    macs, _ = count_macs_per_second(model, RATE)
    print(f"{path.stem}: {macs / 1e6:,.0f} M MACs/s, real-time factor {factor:.4f}", flush=True)


def main() -> None:
    """Print a line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="timed turns (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--utterances", type=int, default=4, help="in a batch (default: 4)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the longest (default: 3)")
    parser.add_argument("--only", choices=["steps", "exports"])
    parser.add_argument("configs", nargs="*", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = args.configs or [REPOSITORY / f"conf/train_{name}.yaml" for name in CONFIGS]
    if args.only != "exports":
        batch = make_batch(args.utterances, args.seconds)
        for path in steps:
            time_steps(path, batch, args.pairs)
    if args.only != "steps":
        exports = [REPOSITORY / f"conf/train_{name}.yaml" for name in EXPORTS]
        for path in [*steps, *([] if args.configs else exports)]:
            time_export(path, args.pairs)


if __name__ == "__main__":
    main()
