"""Time training steps of a recurrent separator with and without `fast_cpu`, in one run.

    python benchmarks/fast_cpu.py egs/mini/dump/audio/train

Four models take the same steps in turns: stock ESPnet, recurrent layers one by one, denormal
numbers
as 0, and both, which is `fast_cpu: true`. Gradients become denormal as a model learns, so the
last half of the steps is what counts.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from training import REPOSITORY, build, step

from cmkt.corpus.audio import read_audio
from cmkt.corpus.datadir import read_table
from cmkt.espnet_plugin.recurrent import run_layer_by_layer

CONFIG = REPOSITORY / "egs/mini/conf/train_blstm.yaml"
CONTENDERS = {  # layer by layer, denormal numbers as 0
    "stock": (False, False),
    "layer by layer": (True, False),
    "denormal numbers as 0": (False, True),
    "both (fast_cpu)": (True, True),
}


def read_batch(mixtures: Path, utterances: int) -> dict[str, torch.Tensor]:
    """Return the first utterances of a mixture directory as ESPnet collates them."""
    batch = {}
    for name, table in (("speech_mix", "wav.scp"), ("speech_ref1", "spk1.scp")):
        files = list(read_table(mixtures / table).values())[:utterances]
        audio = sorted((torch.from_numpy(read_audio(f)[0]).float() for f in files), key=len)[::-1]
        batch[name] = pad_sequence(audio, batch_first=True)
        batch[f"{name}_lengths"] = torch.tensor([len(samples) for samples in audio])
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixtures", type=Path, help="mixture directory (stage 2)")
    parser.add_argument("--steps", type=int, default=14)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch, runs = read_batch(args.mixtures, 32), {}
    for name, (layers, _) in CONTENDERS.items():
        torch.manual_seed(0)
        model = build(CONFIG, "--fast_cpu", "false")
        if layers:
            run_layer_by_layer(model.separator)
        runs[name] = model, torch.optim.Adam(model.parameters(), 4e-3)
    times = {name: [] for name in CONTENDERS}
    for _ in range(args.steps):
        for name, run in runs.items():
            torch.set_flush_denormal(CONTENDERS[name][1])
            times[name].append(step(*run, batch))
    late = {name: statistics.median(values[args.steps // 2 :]) for name, values in times.items()}
    for name, seconds in late.items():
        print(f"{name:<24}{seconds:.3f} s   stock / this {late['stock'] / seconds:.2f}")


if __name__ == "__main__":
    main()
