"""Dense convolutions around dual-path transformers, with a complex ratio mask.

After the second backbone of the BSSE-SE repository (Hung et al., "Boosting Self-Supervised
Embeddings for Speech Enhancement", arXiv 2204.03339), there called DPTNet: a complex STFT, dense
blocks of dilated convolutions and, between them, transformers along frequency and along time whose
feed-forward part is recurrent (Chen et al., "Dual-Path Transformer Network", arXiv 2007.13975).
Unlike there, the transformers see every second frequency, with all 64 channels, and normalisation
never looks beyond a frame.

So no valid frame depends on what lies beyond an utterance's end: convolutions reach only into the
past, and the transformers along time know the lengths.
"""

from collections import OrderedDict

import torch
from espnet2.enh.layers.complex_utils import new_complex_like
from espnet2.enh.separator.abs_separator import AbsSeparator
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cmkt.espnet_plugin.separators.spectrum import require_spectrum
from cmkt.transfer.sequences import lengths_to_mask
from cmkt.transfer.settings import whole


class DenseDualPathSeparator(AbsSeparator):
    """Dense encoder, dual-path layers at half the frequencies, gate, dense decoder, complex mask.

    Args:
        input_dim: frequencies F of the encoder; the weights do not depend on it.
        channels: C, of all convolutions and of the transformers.
        layers: dual-path layers.
        heads: of each attention; they share the channels.
        dense_depth: convolutions in a dense block; the i-th has a dilation of 2^i frames.
        unit: of each direction of the recurrent networks.

    Raises:
        ValueError: a wrong value.
    """

    def __init__(
        self,
        input_dim: int,
        channels: int = 64,
        layers: int = 3,
        heads: int = 4,
        dense_depth: int = 4,
        unit: int = 64,
    ):
        super().__init__()
        whole("channels", channels, 1)
        if channels % whole("heads", heads, 1):
            raise ValueError(f"channels must be a multiple of heads, not {channels} with {heads}")
        layers, unit = whole("layers", layers, 1), whole("unit", unit, 1)
        dense_depth = whole("dense_depth", dense_depth, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(2, channels, 1),
            FrameNorm(channels),
            nn.PReLU(channels),
            DenseBlock(channels, dense_depth),
            nn.Conv2d(channels, channels, (1, 3), stride=(1, 2), padding=(0, 1)),
            FrameNorm(channels),
            nn.PReLU(channels),
        )
        self.layers = nn.ModuleList(DualPathLayer(channels, heads, unit) for _ in range(layers))
        self.tap = nn.Identity()
        self.gated = nn.Conv2d(channels, 2 * channels, 1)
        self.decoder_dense = DenseBlock(channels, dense_depth)
        self.upsample = nn.Conv2d(channels, 2 * channels, (1, 3), padding=(0, 1))
        self.decoder = nn.Sequential(
            FrameNorm(channels), nn.PReLU(channels), nn.Conv2d(channels, 2, 1)
        )

    def forward(self, input, ilens: torch.Tensor, additional: dict | None = None):
        """Enhance a batch of spectra.

        Args:
            input: (B, T, F) complex, of torch or of torch_complex.
            ilens: (B,) valid frames; what lies beyond changes none of them.
            additional: not used.

        Returns:
            [spectrum (B, T, F)], ilens, and {`mask_spk1`: (B, T, F) complex}, by which the input
            was multiplied.

        Raises:
            CmktError: the input is not complex.
        """
        require_spectrum("dense_dual_path", input)
        frames, frequencies = input.shape[1:]
        # Equal lengths need no mask and no packing, which are slow.
        lengths = ilens if bool((ilens < frames).any()) else None
        x = self.encoder(torch.stack([input.real, input.imag], 1))  # (B, C, T, F / 2)
        for layer in self.layers[:-1]:
            x = layer(x, lengths)
        x = self.layers[-1](self.tap(x), lengths)
        value, gate = self.gated(x).chunk(2, dim=1)
        x = self.decoder_dense(value.tanh() * gate.sigmoid())
        x = self.upsample(x)  # (B, 2 C, T, F / 2)
        # Sub-pixel convolution: each frequency's two halves of the channels become neighbours.
        x = torch.stack(x.chunk(2, dim=1), -1).flatten(3)[..., :frequencies]  # (B, C, T, F)
        real, imaginary = self.decoder(x).to(input.real.dtype).unbind(1)
        mask = new_complex_like(input, (real, imaginary))
        return [input * mask], ilens, OrderedDict(mask_spk1=mask)

    @property
    def num_spk(self) -> int:
        """One speaker: this is enhancement, not separation."""
        return 1


class FrameNorm(nn.Module):
    """Normalise each frame over its channels and frequencies; scale and shift are by channel.

    Over frequencies alone, a silent frame would have no variance and would multiply gradients by
    1 / sqrt(1e-5) in every layer; over channels alone, the shape of the spectrum would be lost.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, T, F) normalised, channels last in memory, as all that follows likes it."""
        x = x.permute(0, 2, 3, 1)  # (B, T, F, C)
        shape = x.shape[2:]
        x = F.layer_norm(x, shape, self.weight.expand(shape), self.bias.expand(shape))
        return x.permute(0, 3, 1, 2)


class DenseBlock(nn.Module):
    """Dilated convolutions, each over what all before it have made.

    Args:
        channels: C.
        depth: convolutions of two frames by three frequencies, dilated by 1, 2, 4, ... frames.
    """

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.ZeroPad2d((1, 1, 2**i, 0)),  # in time the past only
                nn.Conv2d((i + 1) * channels, channels, (2, 3), dilation=(2**i, 1)),
                FrameNorm(channels),
                nn.PReLU(channels),
            )
            for i in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, C, T, F) for (B, C, T, F)."""
        made = [x]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return made[-1]


class DualPathLayer(nn.Module):
    """A transformer along each frame's frequencies, then one along each frequency's frames.

    Args:
        channels: C.
        heads: of the attention.
        unit: of each direction of the recurrent networks.
    """

    def __init__(self, channels: int, heads: int, unit: int):
        super().__init__()
        self.frequency_path = RecurrentTransformer(channels, heads, unit)
        self.time_path = RecurrentTransformer(channels, heads, unit)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Return (B, C, T, F) for (B, C, T, F).

        Args:
            x: (B, C, T, F).
            lengths: (B,) valid frames; None: all.
        """
        batch, _, frames, frequencies = x.shape
        x = x.permute(0, 2, 3, 1).flatten(0, 1)  # (B T, F, C)
        x = x + self.frequency_path(x, None)
        x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)  # (B F, T, C)
        lengths = None if lengths is None else lengths.repeat_interleave(frequencies)
        x = x + self.time_path(x, lengths)
        return x.unflatten(0, (batch, frequencies)).permute(0, 3, 2, 1)


class RecurrentTransformer(nn.Module):
    """A transformer layer whose feed-forward part begins with a GRU, which also tells positions.

    Chen et al., "Dual-Path Transformer Network" (arXiv 2007.13975): self-attention, then
    ReLU(RNN(x)) W + b, each with a residual connection and layer normalisation after it.

    Args:
        channels: C.
        heads: of the attention.
        unit: of each direction of the GRU.
    """

    def __init__(self, channels: int, heads: int, unit: int):
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(channels, 3 * channels)
        self.attended = nn.Linear(channels, channels)
        self.attention_norm = nn.LayerNorm(channels)
        self.gru = nn.GRU(channels, unit, batch_first=True, bidirectional=True)
        self.output_layer = nn.Linear(2 * unit, channels)
        self.output_norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Return (N, L, C) for (N, L, C).

        Args:
            x: (N, L, C), N sequences.
            lengths: (N,) valid positions; None: all.
        """
        x = self.attention_norm(x + self._attend(x, lengths))
        return self.output_norm(x + self.output_layer(self._recur(x, lengths).relu()))

    def _attend(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        # Not `nn.MultiheadAttention`: on a CPU, outside of training, it holds all scores (N, heads,
        # L, L) at once.
        mask = None
        if lengths is not None:
            mask = lengths_to_mask(lengths.to(x.device), x.shape[1])[:, None, None]  # (N, 1, 1, L)
        parts = self.projection(x).unflatten(-1, (3, self.heads, -1))  # (N, L, 3, heads, C / heads)
        y = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), attn_mask=mask)
        return self.attended(y.transpose(1, 2).flatten(2))

    def _recur(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        if lengths is None:
            return self.gru(x)[0]
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        return y
