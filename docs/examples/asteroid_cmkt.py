"""Cross-modality transfer in an Asteroid training, on synthetic data: seconds on a CPU.

Needs cmkt and `pip install asteroid`, 0.7 or later. The words are tones; a language model's
embeddings of them are random vectors here. What is yours to write is marked CMKT.
"""

import math

import pytorch_lightning as pl
import torch
from asteroid.engine import System
from asteroid.models import ConvTasNet
from torch.utils.data import DataLoader

from cmkt.transfer import CrossModalTransfer

RATE = 8000
torch.manual_seed(0)
pitch, embedding = 200 + 150 * torch.arange(20), torch.randn(20, 32)  # of 20 words


def make_batch():
    words = torch.randint(20, (8, 6))  # 8 utterances of 6 words, 0.16 s a word
    turns = pitch[words].repeat_interleave(1280, dim=1).cumsum(1) / RATE
    clean = torch.sin(2 * math.pi * turns)  # (B, N)
    return clean + torch.randn_like(clean), clean, words


class Enhancement(System):
    def __init__(self, model, transfer, train_loader, val_loader):
        parameters = [*model.parameters(), *transfer.parameters()]  # CMKT: both are trained
        optimizer, loss = torch.optim.Adam(parameters, 3e-3), torch.nn.L1Loss()
        super().__init__(model, optimizer, loss, train_loader, val_loader)
        self.transfer = transfer
        # CMKT: a hook keeps what the mask is made of, (B, 64, T_a).
        model.masker.mask_net.register_forward_pre_hook(lambda module, x: self.keep(x[0]))

    def keep(self, hidden):
        self.hidden = hidden.transpose(1, 2)  # (B, T_a, 64)

    def common_step(self, batch, batch_nb, train=True):
        noisy, clean, words = batch
        loss_se = self.loss_func(self(noisy)[:, 0], clean)
        hidden, text = self.hidden, embedding[words]  # CMKT: (B, T_a, 64), (B, T_t, 32)
        frames, tokens = (torch.full((len(x),), x.shape[1]) for x in (hidden, text))
        loss_cma = self.transfer(hidden, frames, text, tokens)
        if not train:
            values = self.transfer.diagnostics(hidden, frames, text, tokens)
            values = {"loss_se": loss_se, "loss_cma": loss_cma, **values}
            print("  ".join(f"{name} {value.item():.3f}" for name, value in values.items()))
        return self.transfer.combine(loss_se, loss_cma)


sizes = {"n_blocks": 3, "n_repeats": 1, "bn_chan": 64, "hid_chan": 64, "skip_chan": 64}
model = ConvTasNet(1, **sizes, n_filters=128, kernel_size=128, stride=64, sample_rate=RATE)
transfer = CrossModalTransfer(64, 32, alpha=0.9, alignment={"type": "transformer"})
train = DataLoader([make_batch() for _ in range(25)], batch_size=None)
valid = DataLoader([make_batch()], batch_size=None)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = pl.Trainer(max_epochs=4, accelerator="cpu", num_sanity_val_steps=0, **quiet)
trainer.fit(Enhancement(model, transfer, train, valid))
# Nothing of the transfer is needed after training: `model` is the model.
