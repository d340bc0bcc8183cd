"""Cross-modality transfer in an Asteroid training, on synthetic data: seconds on a CPU.

Needs cmkt and `pip install asteroid`. The words are tones, and the language model's embeddings of
them random vectors. What the transfer adds to a training is marked CMKT.
"""

import math

import pytorch_lightning as pl
import torch
from asteroid.engine import System
from asteroid.models import ConvTasNet
from torch.utils.data import DataLoader

from cmkt.transfer import CrossModalTransfer

torch.manual_seed(0)
pitch, embedding = 200 + 150 * torch.arange(20), torch.randn(20, 32)  # of 20 words, in Hz


def make_batch():
    """Return noisy and clean speech (B, N), and the words (B, T_t) in it."""
    words = torch.randint(20, (8, 6))  # 8 utterances of 6 words, 1280 samples a word
    turns = pitch[words].repeat_interleave(1280, dim=1).cumsum(1) / 8000
    clean = torch.sin(2 * math.pi * turns)
    return clean + torch.randn_like(clean), clean, words


class Enhancement(System):
    """A usual enhancement training, plus the transfer."""

    def common_step(self, batch, batch_nb, train=True):  # noqa: D102
        noisy, clean, words = batch
        loss_se = self.loss_func(self(noisy)[:, 0], clean)
        hidden, text = self.hidden, embedding[words]  # CMKT: (B, T_a, 64) and (B, T_t, 32)
        frames, tokens = (torch.full((len(x),), x.shape[1]) for x in (hidden, text))
        loss_cma = self.transfer(hidden, frames, text, tokens)
        if not train:
            print(f"loss_se {loss_se.item():.3f}  loss_cma {loss_cma.item():.3f}")
            self.values = self.transfer.diagnostics(hidden, frames, text, tokens)
        return self.transfer.combine(loss_se, loss_cma)

    def on_validation_epoch_end(self):
        """Asteroid's own needs a logger."""


sizes = {"n_blocks": 3, "n_repeats": 1, "bn_chan": 64, "hid_chan": 64, "skip_chan": 64}
model = ConvTasNet(1, **sizes, n_filters=128, kernel_size=128, stride=64, sample_rate=8000)
transfer = CrossModalTransfer(64, 32, alpha=0.9, alignment={"type": "transformer"})
parameters = [*model.parameters(), *transfer.parameters()]  # CMKT: both learn; keep `model` alone
train, valid = (DataLoader([make_batch() for _ in range(n)], batch_size=None) for n in (25, 1))
optimizer = torch.optim.Adam(parameters, 3e-3)
system = Enhancement(model, optimizer, torch.nn.L1Loss(), train, valid)
system.transfer = transfer
# CMKT: keep what the masks are made of, (B, 64, T_a), in each forward pass.
tap = model.masker.mask_net  # a hook before it is given a tuple of its arguments
tap.register_forward_pre_hook(lambda m, x: setattr(system, "hidden", x[0].transpose(1, 2)))
options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
pl.Trainer(max_epochs=4, accelerator="cpu", **dict.fromkeys(options, False)).fit(system)
print({name: round(value.item(), 2) for name, value in system.values.items()})
