"""A small speech recogniser: log-mel features, convolutions, characters by CTC.

It has no recurrence, so it is quick on a CPU, and gradients pass through it in evaluation on every
device. What it makes of an utterance does not depend on the padding beside it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torchaudio
from torch import nn

from cmkt.errors import CmktError
from cmkt.settings import read_mapping
from cmkt.stage import MARKER
from cmkt.transfer.sequences import lengths_to_mask

BLANK = 0
WEIGHTS = "model.pth"


class CtcRecogniser(nn.Module):
    """Scores of characters, 50 times a second.

    Args:
        characters: what it can write; output 0 is the blank, output n the character n - 1.
        fs: sampling rate in Hz.
        mels: bands of the features.
        width: of the hidden layers.
        blocks: residual convolutions.
        dropout: after each of them.
    """

    def __init__(
        self,
        characters: Sequence[str],
        fs: int = 16000,
        mels: int = 64,
        width: int = 128,
        blocks: int = 6,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.characters, self.fs = list(characters), fs
        self.window, self.hop = round(0.032 * fs), round(0.01 * fs)
        # Not centred: a frame lies within the valid samples, or is none.
        self.mel = torchaudio.transforms.MelSpectrogram(
            fs, n_fft=self.window, hop_length=self.hop, n_mels=mels, center=False
        )
        self.entry = nn.Conv1d(mels, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(_Block(width, 2 ** (n % 3), dropout) for n in range(blocks))
        self.exit = nn.Linear(width, 1 + len(self.characters))

    def features(self, speech: torch.Tensor, lengths: torch.Tensor):
        """Return log-mel energies of speech at unit power, and the valid frames.

        Args:
            speech: (B, N), zeros beyond the valid samples.
            lengths: (B,) valid samples.

        Returns:
            (B, F, mels), zeros beyond the valid frames, and (B,).
        """
        if speech.shape[1] < self.window:
            speech = nn.functional.pad(speech, (0, self.window - speech.shape[1]))
        power = speech.square().sum(1, keepdim=True) / lengths.clamp(min=1)[:, None]  # (B, 1)
        mel = self.mel(speech * (power + 1e-10).rsqrt())  # (B, mels, F)
        frames = ((lengths - self.window) // self.hop + 1).clamp(min=0)
        # The floor keeps digital silence from outweighing what is heard.
        logarithms = (mel + 1e-2).log().transpose(1, 2)  # (B, F, mels)
        return _masked(logarithms, frames), frames

    def score(self, features: torch.Tensor, frames: torch.Tensor):
        """Return scores before the softmax, and how many are valid.

        Args:
            features: (B, F, mels), zeros beyond the valid frames.
            frames: (B,) valid frames.

        Returns:
            (B, T, 1 + characters) with T = ceil(F / 2), and (B,).
        """
        frames = (frames + 1) // 2
        x = _masked(self.entry(features.transpose(1, 2)).transpose(1, 2), frames)  # (B, T, D)
        for block in self.blocks:
            x = _masked(block(x), frames)
        return self.exit(x), frames

    def forward(self, speech: torch.Tensor, lengths: torch.Tensor):
        """Return what `score` makes of the `features` of speech (B, N)."""
        return self.score(*self.features(speech, lengths))

    def decode(self, scores: torch.Tensor, frames: torch.Tensor) -> list[str]:
        """Return the likeliest character of each frame, repetitions and blanks removed.

        Args:
            scores: (B, T, 1 + characters).
            frames: (B,) valid ones.
        """
        texts = []
        for best, length in zip(scores.argmax(-1).tolist(), frames.tolist(), strict=True):
            best = best[:length]
            kept = [n for n, before in zip(best, [BLANK, *best], strict=False) if n != before]
            texts.append("".join(self.characters[n - 1] for n in kept if n != BLANK))
        return texts


class _Block(nn.Module):
    """x + dropout(relu(norm(conv(x))))."""

    def __init__(self, width: int, dilation: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))  # (B, T, D)
        return x + self.dropout(y.relu())


def _masked(x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    return x * lengths_to_mask(frames, x.shape[1])[..., None]


def read_recogniser(folder: str | Path) -> dict:
    """Return what meta.yaml says of a recogniser of `cmkt train-recogniser`.

    Args:
        folder: of the recogniser.

    Raises:
        CmktError: there is no finished one.
    """
    folder = Path(folder)
    if not all((folder / name).is_file() for name in (MARKER, "meta.yaml", WEIGHTS)):
        raise CmktError("no finished recogniser", folder, remedy="run cmkt train-recogniser")
    return read_mapping(folder / "meta.yaml")


def load_recogniser(folder: str | Path) -> CtcRecogniser:
    """Load a recogniser of `cmkt train-recogniser`, in evaluation mode.

    Args:
        folder: of the recogniser.

    Raises:
        CmktError: there is no finished one.
    """
    meta = read_recogniser(folder)
    model = CtcRecogniser(meta["characters"], meta["sample_rate"], **meta["size"])
    model.load_state_dict(torch.load(Path(folder) / WEIGHTS, map_location="cpu"))
    return model.eval()
