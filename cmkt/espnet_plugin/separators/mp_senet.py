"""MP-SENet: magnitude and phase are enhanced side by side.

Lu, Ai, Ling, "MP-SENet: A speech enhancement model with parallel denoising of magnitude and phase
spectra" (Interspeech 2023, 2305.13686), with Conformer blocks. The long version (2308.08926) has
Transformer blocks whose feed-forward part is a GRU, and dense convolutions that look back only; its
sub-pixel convolutions are transposed ones here, as in the first version. Other than in the papers,
so that a batch of utterances of several lengths gives what each gives alone:

- Instance normalisation takes its mean and variance from the valid frames.
- Time attention, time convolutions and the GRU do not see the padding.
- The Conformer's convolution has layer normalisation in place of batch normalisation.
"""

from collections import OrderedDict
from itertools import repeat

import torch
from espnet2.enh.layers.complex_utils import new_complex_like
from espnet2.enh.separator.abs_separator import AbsSeparator
from torch import nn
from torch.nn.functional import glu, leaky_relu, scaled_dot_product_attention
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from cmkt.errors import CmktError
from cmkt.espnet_plugin.separators.spectrum import require_spectrum
from cmkt.transfer.sequences import lengths_to_mask
from cmkt.transfer.settings import choice, number, whole

# Added to squared magnitudes, so that roots and powers have a gradient at 0.
FLOOR = 1e-9
# A CUDA kernel of attention takes at most 65,535 sequences at once.
MOST_SEQUENCES = 65_535


class MPSENetSeparator(AbsSeparator):
    """MP-SENet on the complex spectrum of ESPnet's `stft` encoder.

    The published models have 64 channels and 4 blocks, with an STFT of 400 samples every 100 and
    16 kHz; `block: conformer` is the Interspeech version, `block: transformer` the long one.

    Args:
        input_dim: frequencies F, at least 3; the model is made for this number.
        num_spk: speakers, each with a mask and a phase of its own; 1 in the paper.
        channels: C, a multiple of `heads`.
        blocks: time-frequency blocks, each along time and then along frequency.
        block: `conformer` or `transformer`.
        heads: of the attention.
        dense_depth: dilated convolutions in a dense block.
        kernel: frames, or frequencies, that the Conformer's convolution spans; odd.
        dropout: of the Conformer's feed-forward and attention, and of the Transformer's attention
            and residuals; 0.2 in the published Conformer, 0 in the Transformer.
        compression: exponent of the magnitude.
        beta: largest value of the magnitude mask.
        checkpointing: in training, compute each block a second time in the backward pass instead
            of keeping what it computed: less memory, more time, the same result.

    Raises:
        CmktError: too few frequencies, or channels that the heads do not divide.
        ValueError: a wrong value.
    """

    def __init__(
        self,
        input_dim: int,
        num_spk: int = 1,
        channels: int = 64,
        blocks: int = 4,
        block: str = "conformer",
        heads: int = 4,
        dense_depth: int = 4,
        kernel: int = 31,
        dropout: float = 0.0,
        compression: float = 0.3,
        beta: float = 2.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        whole("mp_senet.blocks", blocks, 1)
        number("mp_senet.compression", compression, 0, 1, above=True)
        choice("mp_senet.block", block, BLOCKS)
        if input_dim < 3:
            raise CmktError(
                f"mp_senet: {input_dim} frequencies are too few", remedy="use a larger n_fft"
            )
        if channels % heads:
            raise CmktError(
                f"mp_senet: {heads} heads do not divide {channels} channels",
                remedy="make separator_conf.channels a multiple of separator_conf.heads",
            )
        if kernel % 2 == 0:
            raise CmktError(f"mp_senet: kernel must be odd, not {kernel}")
        self._num_spk, self.compression, self.checkpointing = num_spk, compression, checkpointing
        settings = {"channels": channels, "heads": heads, "dropout": dropout}
        if block == "conformer":
            settings["kernel"] = kernel
        dense = {"channels": channels, "depth": dense_depth, "span": DENSE_SPANS[block]}
        self.encoder = DenseEncoder(dense)
        self.blocks = nn.ModuleList(
            TimeFrequencyBlock(BLOCKS[block], settings) for _ in range(blocks)
        )
        # Where the transfer listens: (B, C, T, F'), before the last block.
        self.tap = nn.Identity()
        self.magnitude_decoder = MagnitudeDecoder(dense, input_dim, num_spk, beta)
        self.phase_decoder = PhaseDecoder(dense, input_dim, num_spk)

    def forward(
        self, input: torch.Tensor, ilens: torch.Tensor, additional: dict | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor, OrderedDict]:
        """Enhance a batch of spectra.

        Args:
            input: (B, T, F) complex.
            ilens: (B,) valid frames.
            additional: not used.

        Returns:
            the spectrum (B, T, F) of each speaker, zeros in the padding; `ilens`; and, for the
            losses, `compressed_spk<n>`, the same spectrum with compressed magnitudes.
        """
        require_spectrum("mp_senet", input)
        real, imaginary = at_least_single(input.real), at_least_single(input.imag)
        magnitude = (real.square() + imaginary.square() + FLOOR) ** (self.compression / 2)
        # Adding 0 turns the -0 that a real-valued bin may have into 0: its phase is pi, not -pi.
        phase = torch.atan2(imaginary + 0.0, real)
        frames = Frames(ilens.to(input.device), input.shape[1])
        x = self.encoder(torch.stack([magnitude, phase], 1) * frames.mask, frames)
        for place, block in enumerate(self.blocks, 1):
            if place == len(self.blocks):
                x = self.tap(x)  # (B, C, T, F')
            if self.checkpointing and self.training:
                x = checkpoint(block, x, frames, use_reentrant=False)
            else:
                x = block(x, frames)
        x = x * frames.mask
        masks = at_least_single(self.magnitude_decoder(x, frames))  # (B, num_spk, T, F)
        directions = self.phase_decoder(x, frames)  # (B, 2, num_spk, T, F)
        compressed = masks * magnitude[:, None] * frames.mask
        enhanced = compressed ** (1 / self.compression)
        spectra, others = [], OrderedDict()
        for speaker in range(self.num_spk):
            real, imaginary = directions[:, :, speaker].unbind(1)  # (B, T, F)
            large, small = enhanced[:, speaker], compressed[:, speaker]
            spectra.append(new_complex_like(input, (large * real, large * imaginary)))
            others[f"compressed_spk{speaker + 1}"] = new_complex_like(
                input, (small * real, small * imaginary)
            )
        return spectra, ilens, others

    @property
    def num_spk(self) -> int:
        """Number of speakers in the output."""
        return self._num_spk


def at_least_single(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of half precision in single precision, and others as they are."""
    return x if x.dtype == torch.float64 else x.float()


class Frames:
    """Which frames of a batch are valid.

    Args:
        lengths: (B,) valid frames.
        size: T.
    """

    def __init__(self, lengths: torch.Tensor, size: int):
        valid = lengths_to_mask(lengths, size)  # (B, T)
        self.mask = valid[:, None, :, None].float()  # (B, 1, T, 1)
        # None where there is no padding: attention without a mask is faster.
        self.valid = None if bool(valid.all()) else valid


class MaskedInstanceNorm(nn.Module):
    """Normalise each channel of an utterance over its valid frames and all frequencies."""

    def __init__(self, channels: int, epsilon: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Normalise x (B, C, T, F)."""
        x = at_least_single(x)  # half precision has no room for sums over a spectrum
        count = frames.mask.sum((2, 3), keepdim=True) * x.shape[3]  # (B, 1, 1, 1)
        x = x - (x * frames.mask).sum((2, 3), keepdim=True) / count
        variance = (x.square() * frames.mask).sum((2, 3), keepdim=True) / count
        return x * (torch.rsqrt(variance + self.epsilon) * self.weight) + self.bias


class ConvolutionUnit(nn.Module):
    """A convolution, instance normalisation and PReLU, with zeros in the padding."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.convolution = convolution
        self.norm = MaskedInstanceNorm(convolution.out_channels)
        self.activation = nn.PReLU(convolution.out_channels)

    def forward(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Return what comes of x (B, C, T, F)."""
        y = self.convolution(x)[:, :, : x.shape[2]]
        return self.activation(self.norm(y, frames)) * frames.mask


class DenseBlock(nn.Module):
    """Convolutions over frames 1, 2, 4, ... apart, each of all that came before.

    Args:
        channels: C.
        depth: convolutions.
        span: 3 frames, the middle one and one to each side, or 2, this one and an earlier one.
    """

    def __init__(self, channels: int, depth: int, span: int):
        super().__init__()
        # With a span of 2 there are frames too many at the end, which are cut off.
        self.units = nn.ModuleList(
            ConvolutionUnit(
                nn.Conv2d(
                    channels * (level + 1),
                    channels,
                    (span, 3),
                    dilation=(2**level, 1),
                    padding=(2**level, 1),
                )
            )
            for level in range(depth)
        )

    def forward(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Return the last convolution's output (B, C, T, F) of x (B, C, T, F), zeros as padding."""
        known = x
        for unit in self.units:
            x = unit(known, frames)
            known = torch.cat([x, known], 1)
        return x


class DenseEncoder(nn.Module):
    """Magnitude and phase (B, 2, T, F) to (B, C, T, F'), F' = (F - 1) // 2."""

    def __init__(self, dense: dict):
        super().__init__()
        channels = dense["channels"]
        self.enter = ConvolutionUnit(nn.Conv2d(2, channels, 1))
        self.dense = DenseBlock(**dense)
        self.downsample = ConvolutionUnit(nn.Conv2d(channels, channels, (1, 3), stride=(1, 2)))

    def forward(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Encode x (B, 2, T, F)."""
        return self.downsample(self.dense(self.enter(x, frames), frames), frames)


def _upsample(channels: int, frequencies: int) -> nn.ConvTranspose2d:
    """Return the convolution from F' = (F - 1) // 2 back to F frequencies."""
    odd = frequencies % 2
    return nn.ConvTranspose2d(
        channels, channels, (1, 3), stride=(1, 2), output_padding=(0, 1 - odd)
    )


class MagnitudeDecoder(nn.Module):
    """(B, C, T, F') to magnitude masks (B, num_spk, T, F) between 0 and `beta`."""

    def __init__(self, dense: dict, frequencies: int, num_spk: int, beta: float):
        super().__init__()
        channels = dense["channels"]
        self.dense = DenseBlock(**dense)
        self.upsample = _upsample(channels, frequencies)
        self.unit = ConvolutionUnit(nn.Conv2d(channels, num_spk, 1))
        self.leave = nn.Conv2d(num_spk, num_spk, 1)
        # The learnable sigmoid: each frequency has its own slope.
        self.slope = nn.Parameter(torch.ones(frequencies))
        self.beta = beta

    def forward(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Decode x (B, C, T, F')."""
        x = self.leave(self.unit(self.upsample(self.dense(x, frames)), frames))
        return self.beta * torch.sigmoid(self.slope * x)


class PhaseDecoder(nn.Module):
    """(B, C, T, F') to the cosine and sine (B, 2, num_spk, T, F) of a phase.

    The paper takes the phase of two outputs by the two-argument arc tangent; its cosine and sine
    are these outputs, scaled to length 1, without the gradient that an angle lacks at (0, 0).
    """

    def __init__(self, dense: dict, frequencies: int, num_spk: int):
        super().__init__()
        channels = dense["channels"]
        self.dense = DenseBlock(**dense)
        self.upsample = ConvolutionUnit(_upsample(channels, frequencies))
        self.real = nn.Conv2d(channels, num_spk, 1)
        self.imaginary = nn.Conv2d(channels, num_spk, 1)

    def forward(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Decode x (B, C, T, F')."""
        x = self.upsample(self.dense(x, frames), frames)
        pair = at_least_single(torch.stack([self.real(x), self.imaginary(x)], 1))
        return pair * torch.rsqrt(pair.square().sum(1, keepdim=True) + FLOOR)


class TimeFrequencyBlock(nn.Module):
    """One layer along time, then one along frequency, each with a residual around it."""

    def __init__(self, kind: type[nn.Module], settings: dict):
        super().__init__()
        self.along_time, self.along_frequency = kind(**settings), kind(**settings)

    def forward(self, x: torch.Tensor, frames: Frames) -> torch.Tensor:
        """Return (B, C, T, F') of x (B, C, T, F')."""
        batch, channels, time, frequencies = x.shape
        valid = None if frames.valid is None else frames.valid.repeat_interleave(frequencies, 0)
        x = x.permute(0, 3, 2, 1).reshape(batch * frequencies, time, channels)
        x = x + self.along_time(x, valid)
        x = x.view(batch, frequencies, time, channels).transpose(1, 2)
        x = x.reshape(batch * time, frequencies, channels)
        x = x + self.along_frequency(x)
        return x.view(batch, time, frequencies, channels).permute(0, 3, 1, 2)


class SelfAttention(nn.Module):
    """Layer normalisation and multi-head self-attention over the valid steps."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.enter = nn.Linear(channels, 3 * channels)
        self.leave = nn.Linear(channels, channels)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Attend within each of the sequences x (N, L, C)."""
        if len(x) > MOST_SEQUENCES:
            known = repeat(None) if valid is None else valid.split(MOST_SEQUENCES)
            parts = zip(x.split(MOST_SEQUENCES), known, strict=False)
            return torch.cat([self(*part) for part in parts])
        steps = self.enter(self.norm(x)).unflatten(2, (3, self.heads, -1))  # (N, L, 3, H, C / H)
        query, key, value = steps.permute(2, 0, 3, 1, 4)  # each (N, H, L, C / H)
        mask = None if valid is None else valid[:, None, None]  # (N, 1, 1, L)
        dropout = self.dropout if self.training else 0.0
        heard = scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.leave(heard.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    """The Conformer's feed-forward part on (N, L, C), four times as wide inside."""

    def __init__(self, channels: int, dropout: float):
        super().__init__(
            nn.LayerNorm(channels),
            nn.Linear(channels, 4 * channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, channels),
            nn.Dropout(dropout),
        )


class Convolution(nn.Module):
    """The Conformer's convolution, depthwise over `kernel` steps, twice as wide inside."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        width = 2 * channels
        self.norm = nn.LayerNorm(channels)
        self.enter = nn.Linear(channels, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.inner_norm = nn.LayerNorm(width)  # batch normalisation in the paper
        self.activation = nn.SiLU()
        self.leave = nn.Linear(width, channels)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve the sequences x (N, L, C)."""
        x = glu(self.enter(self.norm(x)), -1)
        if valid is not None:
            x = x * valid[..., None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.leave(self.activation(self.inner_norm(x)))


class ConformerLayer(nn.Module):
    """Half a feed-forward part, attention, convolution and half a feed-forward part."""

    def __init__(self, channels: int, heads: int, dropout: float, kernel: int):
        super().__init__()
        self.first = FeedForward(channels, dropout)
        self.attention = SelfAttention(channels, heads, dropout)
        self.convolution = Convolution(channels, kernel)
        self.second = FeedForward(channels, dropout)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return (N, L, C) of x (N, L, C); `valid` (N, L) is None if all steps are."""
        x = x + 0.5 * self.first(x)
        x = x + self.attention(x, valid)
        x = x + self.convolution(x, valid)
        x = x + 0.5 * self.second(x)
        return self.norm(x)


class TransformerLayer(nn.Module):
    """Attention, then a bidirectional GRU as feed-forward part."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.attention = SelfAttention(channels, heads, dropout)
        self.inner_norm = nn.LayerNorm(channels)
        self.gru = nn.GRU(channels, 2 * channels, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(4 * channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return (N, L, C) of x (N, L, C); `valid` (N, L) is None if all steps are."""
        x = x + self.dropout(self.attention(x, valid))
        steps = self.inner_norm(x)
        if valid is None:
            steps, _ = self.gru(steps)
        else:
            # The backward direction begins at the last valid frame.
            lengths = valid.sum(1).cpu()
            steps = pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
            steps, _ = self.gru(steps)
            steps, _ = pad_packed_sequence(steps, batch_first=True, total_length=x.shape[1])
        return self.norm(x + self.dropout(self.leave(leaky_relu(steps))))


BLOCKS = {"conformer": ConformerLayer, "transformer": TransformerLayer}
# Frames that a convolution of a dense block spans, in the version that has these blocks.
DENSE_SPANS = {"conformer": 3, "transformer": 2}
