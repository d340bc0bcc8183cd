"""Time a streaming separator frame by frame beside the same weights on the whole signal.

    python benchmarks/streaming.py [--config conf/train_gtcrn.yaml] [--seconds 4] [--turns 7]

Both enhance the same noise on one core, in turns, with random weights. The real-time factor is the
time over that of the signal. CPU time is what this process has used, whatever else the machine
does; wall time includes the waiting for a core. The slowest frame tells whether a stream keeps up.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from cmkt.enhance.loading import Enhancer
from cmkt.enhance.streaming import StreamingEnhancer
from cmkt.espnet_plugin.build import build_enhancement_model
from cmkt.espnet_plugin.info import describe
from cmkt.settings import read_mapping

CONFIG = Path(__file__).resolve().parent.parent / "conf/train_gtcrn.yaml"
TARGET = 0.2  # largest real-time factor wanted of a stream


def load(config: dict) -> tuple[Enhancer, StreamingEnhancer]:
    """Return both enhancers with the same random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(config))
        (Path(folder) / "meta.yaml").write_text(f"sample_rate: {config['sample_rate']}\n")
        torch.save(build_enhancement_model(config).state_dict(), Path(folder) / "model.pth")
        return Enhancer(folder), StreamingEnhancer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="training YAML")
    parser.add_argument("--seconds", type=float, default=4.0, help="of audio")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = read_mapping(args.config)
    whole, stream = load(config)
    rate, hop = stream.sample_rate, config["encoder_conf"]["hop_length"]
    noise = np.random.default_rng(0).normal(0, 0.1, int(args.seconds * rate)).astype(np.float32)
    pieces, frames = np.split(noise, range(hop, len(noise), hop)), []

    def run_stream() -> None:
        for piece in pieces:
            start = time.perf_counter()
            stream.push(piece)
            frames.append(time.perf_counter() - start)
        stream.flush()

    runs, times = {"whole": lambda: whole(noise), "frame by frame": run_stream}, {}
    for turn in range(args.turns + 1):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            if turn:  # the first warms up
                times.setdefault(name, []).append([part / args.seconds for part in spent])
    size = describe(config)
    print(f"torch {torch.__version__}, 1 thread, {os.cpu_count()} cores, load average "
          f"{os.getloadavg()[0]:.1f}; {size['parameters']:,} parameters, "
          f"{size['macs_per_second'] / 1e6:.1f} M MACs/s, latency "
          f"{1000 * stream.latency / rate:.0f} ms")  # fmt: skip
    print("| | real-time factor, CPU | wall | wanted |\n|---|---|---|---|")
    for name, values in times.items():
        wall, cpu = (statistics.median(part) for part in zip(*values, strict=True))
        wanted = f"<= {TARGET}" if name != "whole" else ""
        print(f"| {name} | {cpu:.3f} | {wall:.3f} | {wanted} |")
    late = np.percentile(frames, [50, 95, 100]) * 1000
    print(f"a frame of {1000 * hop / rate:.0f} ms takes {late[0]:.2f} ms (median), {late[1]:.2f} "
          f"(95 %), {late[2]:.2f} (largest), wall time")  # fmt: skip


if __name__ == "__main__":
    main()
