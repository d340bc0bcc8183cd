"""A BLSTM with summed directions that estimates a mask or the log1p magnitude of clean speech.

After the BLSTM of the BSSE-SE repository (Hung et al., "Boosting Self-Supervised Embeddings for
Speech Enhancement", arXiv 2204.03339): log1p magnitude of an STFT of 400 samples every 160, two
layers of 256 units, directions summed, a sigmoid mask. Unlike there, the directions are summed
after each layer and not after the last one only, and the mask is of the magnitude and not of its
log1p.
"""

from collections import OrderedDict

import torch
from espnet2.enh.separator.abs_separator import AbsSeparator
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cmkt.espnet_plugin.separators.spectrum import require_spectrum
from cmkt.transfer.settings import truth, whole

SMALLEST_POWER = 1e-12  # keeps the gradient of a magnitude finite in silence


class BLSTMSumSeparator(AbsSeparator):
    """log1p magnitude -> linear -> BLSTM layers -> linear -> mask or log1p magnitude.

    Args:
        input_dim: frequencies F of the encoder.
        layer: BLSTM layers.
        unit: width D of each direction, and of the sum of both.
        mapping: estimate the log1p magnitude itself; false: a mask from 0 to 1. The phase stays the
            noisy one.

    Raises:
        ValueError: a wrong value.
    """

    def __init__(self, input_dim: int, layer: int = 2, unit: int = 256, mapping: bool = False):
        super().__init__()
        layer, unit = whole("layer", layer, 1), whole("unit", unit, 1)
        self.mapping = truth("mapping", mapping)
        self.input_layer = nn.Linear(input_dim, unit)
        self.blstm = nn.ModuleList(
            nn.LSTM(unit, unit, batch_first=True, bidirectional=True) for _ in range(layer)
        )
        self.tap = nn.Identity()
        self.output_layer = nn.Linear(unit, input_dim)

    def forward(self, input, ilens: torch.Tensor, additional: dict | None = None):
        """Enhance a batch of spectra.

        Args:
            input: (B, T, F) complex, of torch or of torch_complex.
            ilens: (B,) valid frames; what lies beyond changes none of them.
            additional: not used.

        Returns:
            [spectrum (B, T, F)], ilens, and {`mask_spk1`: (B, T, F)}, by which the input was
            multiplied.

        Raises:
            CmktError: the input is not complex.
        """
        require_spectrum("blstm_sum", input)
        power = input.real.square() + input.imag.square()
        magnitude = power.clamp(min=SMALLEST_POWER).sqrt()  # (B, T, F)
        lengths = ilens.cpu()
        x = self.input_layer(magnitude.log1p())  # (B, T, D)
        for blstm in self.blstm[:-1]:
            x = _sum_directions(blstm, x, lengths)
        x = _sum_directions(self.blstm[-1], self.tap(x), lengths)
        x = self.output_layer(x)  # (B, T, F)
        mask = x.relu().expm1() / magnitude if self.mapping else x.sigmoid()
        return [input * mask], ilens, OrderedDict(mask_spk1=mask)

    @property
    def num_spk(self) -> int:
        """One speaker: this is enhancement, not separation."""
        return 1


def _sum_directions(blstm: nn.LSTM, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Run a layer over (B, T, D) and add its two directions: (B, T, D)."""
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    both, _ = pad_packed_sequence(blstm(packed)[0], batch_first=True, total_length=x.shape[1])
    return both.unflatten(-1, (2, -1)).sum(-2)
