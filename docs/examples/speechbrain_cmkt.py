"""Cross-modality transfer in a SpeechBrain training, on synthetic data: seconds on a CPU.

Needs cmkt and `pip install speechbrain`. The words are tones, and the language model's embeddings
of them random vectors. What the transfer adds to a training is marked CMKT.
"""

import math

import speechbrain as sb
import torch
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.normalization import LayerNorm
from speechbrain.nnet.RNN import LSTM
from speechbrain.processing.features import STFT, spectral_magnitude
from torch.utils.data import DataLoader

from cmkt.transfer import CrossModalTransfer

torch.manual_seed(0)
pitch, embedding = 200 + 150 * torch.arange(20), torch.randn(20, 32)  # of 20 words, in Hz
spectrum = STFT(sample_rate=8000, win_length=32, hop_length=16, n_fft=256)


def make_batch():
    """Return noisy and clean log-spectra (B, T_a, 129), and the words (B, T_t) in them."""
    words = torch.randint(20, (8, 6))  # 8 utterances of 6 words, 1280 samples a word
    turns = pitch[words].repeat_interleave(1280, dim=1).cumsum(1) / 8000
    clean = torch.sin(2 * math.pi * turns)
    signals = clean + torch.randn_like(clean), clean
    return *(spectral_magnitude(spectrum(x), power=0.5).log1p() for x in signals), words


class Enhancement(sb.Brain):
    """A usual enhancement training, plus the transfer."""

    def compute_forward(self, batch, stage):  # noqa: D102
        return self.modules.enhancer(batch[0])

    def compute_objectives(self, predictions, batch, stage):  # noqa: D102
        loss_se = sb.nnet.losses.l1_loss(predictions, batch[1])
        hidden, text = self.hidden, embedding[batch[2]]  # CMKT: (B, T_a, 64) and (B, T_t, 32)
        frames, tokens = (torch.full((len(x),), x.shape[1]) for x in (hidden, text))
        loss_cma = self.modules.transfer(hidden, frames, text, tokens)
        if stage != sb.Stage.TRAIN:
            print(f"loss_se {loss_se.item():.3f}  loss_cma {loss_cma.item():.3f}")
            self.values = self.modules.transfer.diagnostics(hidden, frames, text, tokens)
        return self.modules.transfer.combine(loss_se, loss_cma)


enhancer = sb.nnet.containers.Sequential(input_shape=[None, None, 129])
for layer, sizes in ((LayerNorm, {}), (LSTM, {"hidden_size": 64}), (Linear, {"n_neurons": 129})):
    enhancer.append(layer, layer_name=layer.__name__, **sizes)
transfer = CrossModalTransfer(64, 32, alpha=0.9, alignment={"type": "transformer"})
modules = {"enhancer": enhancer, "transfer": transfer}  # CMKT: both learn; keep the first alone
brain = Enhancement(modules, lambda p: torch.optim.Adam(p, 3e-3), run_opts={"device": "cpu"})
# CMKT: keep what the LSTM, whose output is a pair, puts out in each forward pass.
enhancer.LSTM.register_forward_hook(lambda module, x, y: setattr(brain, "hidden", y[0]))
train, valid = (DataLoader([make_batch() for _ in range(n)], batch_size=None) for n in (25, 1))
brain.fit(range(4), train, valid, progressbar=False)
print({name: round(value.item(), 2) for name, value in brain.values.items()})
