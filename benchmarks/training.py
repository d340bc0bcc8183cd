"""Time one training step of each CMKT configuration against its baseline, in one run.

    python benchmarks/training_step.py [--pairs 9]

Steps of the two models alternate (A B A B ...), so a machine that slows down slows both; printed
are the medians and the median of the pairwise ratio.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def build(path: Path, *options: str):
    """Build the model of a YAML, with further options, as `cmkt train` does."""
    from cmkt.espnet_plugin.task import TransferEnhancementTask
    from cmkt.espnet_plugin.train import _parse

    command = ["--config", str(path), "--output_dir", "x", *options]
    args = _parse(TransferEnhancementTask, command, path)
    # Without the statistics of a corpus, which standardised targets would need.
    args.transfer_conf = {**args.transfer_conf, "linguistic_dim": 384, "standardise": False}
    return TransferEnhancementTask.build_model(args).train()


def step(model, optimizer, batch) -> float:
    """Run one update and return its time in seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss, _, _ = model(**batch)
    loss.sum().backward()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each pair of configurations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("configs", nargs="*", type=Path,
                        default=[REPOSITORY / "egs/mini/conf/train_blstm.yaml"])  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = torch.randint(40000, 56001, (16,)).sort(descending=True)[0]
    batch = {
        "speech_mix": 0.1 * torch.randn(16, 56000),
        "speech_mix_lengths": lengths,
        "speech_ref1": 0.1 * torch.randn(16, 56000),
        "speech_ref1_lengths": lengths,
        "linguistic": torch.randn(16, 12, 384),
        "linguistic_lengths": torch.randint(6, 13, (16,)),
    }
    for path in args.configs:
        pair = [build(path), build(path.with_stem(path.stem + "_cmkt"))]
        optimizers = [torch.optim.Adam(model.parameters()) for model in pair]
        for model, optimizer in zip(pair, optimizers, strict=True):
            step(model, optimizer, batch)  # warm-up
        times = [[step(m, o, batch) for m, o in zip(pair, optimizers, strict=True)]
                 for _ in range(args.pairs)]  # fmt: skip
        base, twin = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        print(f"{path.stem}: baseline {base:.3f} s, CMKT {twin:.3f} s, median ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
