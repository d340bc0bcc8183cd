"""Cross-modality transfer in a SpeechBrain training, on synthetic data: seconds on a CPU.

Needs cmkt and `pip install speechbrain`, 1.1 or later. The words are tones; a language model's
embeddings of them are random vectors here. What is yours to write is marked CMKT.
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

RATE = 8000
torch.manual_seed(0)
pitch, embedding = 200 + 150 * torch.arange(20), torch.randn(20, 32)  # of 20 words
spectrum = STFT(sample_rate=RATE, win_length=32, hop_length=16, n_fft=256)


def make_batch():
    words = torch.randint(20, (8, 6))  # 8 utterances of 6 words, 0.16 s a word
    turns = pitch[words].repeat_interleave(1280, dim=1).cumsum(1) / RATE
    clean = torch.sin(2 * math.pi * turns)  # (B, N)
    return clean + torch.randn_like(clean), clean, words


def features(signal):
    return spectral_magnitude(spectrum(signal), power=0.5).log1p()  # (B, T_a, 129)


class Enhancement(sb.Brain):
    def compute_forward(self, batch, stage):
        return self.modules.enhancer(features(batch[0]))

    def compute_objectives(self, predictions, batch, stage):
        loss_se = sb.nnet.losses.l1_loss(predictions, features(batch[1]))
        hidden, text = self.hidden, embedding[batch[2]]  # CMKT: (B, T_a, 64), (B, T_t, 32)
        frames, tokens = (torch.full((len(x),), x.shape[1]) for x in (hidden, text))
        loss_cma = self.modules.transfer(hidden, frames, text, tokens)
        if stage != sb.Stage.TRAIN:
            values = self.modules.transfer.diagnostics(hidden, frames, text, tokens)
            values = {"loss_se": loss_se, "loss_cma": loss_cma, **values}
            print("  ".join(f"{name} {value.item():.3f}" for name, value in values.items()))
        return self.modules.transfer.combine(loss_se, loss_cma)


enhancer = sb.nnet.containers.Sequential(input_shape=[None, None, 129])
enhancer.append(LayerNorm, layer_name="norm")
enhancer.append(LSTM, hidden_size=64, layer_name="rnn")
enhancer.append(Linear, n_neurons=129, layer_name="output")
transfer = CrossModalTransfer(64, 32, alpha=0.9, alignment={"type": "transformer"})
modules = {"enhancer": enhancer, "transfer": transfer}  # CMKT: both are trained
brain = Enhancement(modules, lambda p: torch.optim.Adam(p, 3e-3), run_opts={"device": "cpu"})
# CMKT: a hook keeps what the recurrent layer puts out, (B, T_a, 64).
enhancer.rnn.register_forward_hook(lambda module, x, y: setattr(brain, "hidden", y[0]))
train = DataLoader([make_batch() for _ in range(25)], batch_size=None)
brain.fit(range(4), train, DataLoader([make_batch()], batch_size=None), progressbar=False)
# Nothing of the transfer is needed after training: `enhancer` is the model.
