"""GTCRN: a causal separator of 24 thousand parameters that also runs frame by frame.

Rong et al., "GTCRN: A speech enhancement model requiring ultralow computational resources",
ICASSP 2024. Magnitude, real and imaginary part go through merged bands, an encoder, two dual-path
recurrent blocks and a mirrored decoder with skip connections, which gives a complex ratio mask.

No layer looks at a later frame, so the only delay is that of the STFT, one window. All modules
take and return the state of the frames before; a whole utterance starts from zeros. So frame by
frame, or in pieces of any length, the output is that of the whole.
"""

import copy
import math
from collections import OrderedDict
from itertools import repeat

import torch
from espnet2.enh.layers.complex_utils import new_complex_like
from espnet2.enh.separator.abs_separator import AbsSeparator
from torch import nn

from cmkt.errors import CmktError
from cmkt.espnet_plugin.frame_by_frame import MergedGRU, fold_normalisation
from cmkt.espnet_plugin.separators.spectrum import require_spectrum
from cmkt.transfer.sequences import lengths_to_mask

LINEAR_UNTIL = 2000.0  # Hz; the bins up to here are kept, those above are merged
BANDS, BANDS_UNTIL = 64, 8000.0  # the paper's bands above, at its sampling rate of 16 kHz
DILATIONS = (1, 2, 5)  # in frames, of the encoder's temporal blocks; the decoder has them reversed


def _to_erb(hertz: float) -> float:
    """Return a place on the scale of equivalent rectangular bandwidths (Glasberg, Moore 1990)."""
    return 21.4 * math.log10(1 + 0.00437 * hertz)


def split_bands(bins: int, sample_rate: int) -> tuple[int, torch.Tensor]:
    """Lay out bands over the bins of an STFT as the paper does for 257 bins at 16 kHz.

    Bins up to 2 kHz stay. Above, centres of bands lie at equal distances on the ERB scale, as many
    per ERB as the paper's 64 up to 8 kHz, but none narrower than a bin. The number of all bands is
    a multiple of 4 plus 1, which halving the frequencies twice and doubling them twice keeps.

    Args:
        bins: of the STFT, from 0 Hz to half the sampling rate.
        sample_rate: in Hz.

    Returns:
        how many bins stay, and triangles (bins merged, bands): linear interpolation from the bands
        to the bins, so each row sums to 1.

    Raises:
        CmktError: too few bins above 2 kHz to merge.
    """
    width = sample_rate / 2 / (bins - 1)  # of a bin, in Hz
    kept = round(LINEAR_UNTIL / width) + 1
    low, high = _to_erb(kept * width), _to_erb(sample_rate / 2)
    density = BANDS / (_to_erb(BANDS_UNTIL) - _to_erb(LINEAR_UNTIL))
    narrowest = _to_erb(LINEAR_UNTIL + width) - _to_erb(LINEAR_UNTIL)
    count = round((high - _to_erb(LINEAR_UNTIL)) * min(density, 1 / narrowest))
    count = (kept + count - 1) // 4 * 4 + 1 - kept
    if count < 2:
        raise CmktError(
            f"separator gtcrn cannot split {bins} bins at {sample_rate} Hz into bands",
            remedy="set separator_conf.sample_rate, at least 8000, and a larger n_fft",
        )
    places = torch.linspace(low, high, count, dtype=torch.float64)
    centres = (10 ** (places / 21.4) - 1) / 0.00437 / width - kept  # in bins above those kept
    distances = torch.arange(bins - kept, dtype=torch.float64)[:, None] - centres
    spacing = centres.diff()
    end = spacing.new_full((1,), math.inf)  # beyond the outer centres their bands stay at 1
    rising = 1 + distances / torch.cat([end, spacing])
    falling = 1 - distances / torch.cat([spacing, end])
    return kept, torch.minimum(rising, falling).clamp(0, 1).float()


class Bands(nn.Module):
    """Merges the bins of an STFT to bands, and splits bands to bins.

    Args:
        bins, sample_rate: see `split_bands`.

    Attributes:
        count: how many bands there are, the bins that stay among them.
    """

    def __init__(self, bins: int, sample_rate: int):
        super().__init__()
        self.kept, triangles = split_bands(bins, sample_rate)
        self.count = self.kept + triangles.shape[1]
        # Computed from the configuration, so no part of a checkpoint.
        self.register_buffer("splitting", triangles.T.contiguous(), persistent=False)
        self.register_buffer("merging", triangles / triangles.sum(0), persistent=False)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of the bins of each band: (..., bins) to (..., bands)."""
        return torch.cat([x[..., : self.kept], x[..., self.kept :] @ self.merging], -1)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return each bin, interpolated between its two bands: (..., bands) to (..., bins)."""
        return torch.cat([x[..., : self.kept], x[..., self.kept :] @ self.splitting], -1)


class FrameNorm(nn.BatchNorm2d):
    """Batch normalisation that takes no statistics of padding.

    In evaluation each frame is scaled by fixed numbers, so nothing of the future enters.
    """

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise.

        Args:
            x: (B, C, T, F).
            valid: indices of the valid ones among the B T frames; None if there is no padding.
        """
        if valid is None or not self.training:
            return super().forward(x)
        frames = x.transpose(1, 2).flatten(0, 1)  # (B T, C, F)
        normed = super().forward(frames[valid].unsqueeze(2)).squeeze(2)
        frames = normed.new_zeros(frames.shape).index_copy(0, valid, normed)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class ConvolutionBlock(nn.Module):
    """A convolution over frequency alone, normalisation and activation.

    Args:
        convolution: (B, C, T, F) to (B, C', T, F').
        activation: what follows the normalisation.
    """

    def __init__(self, convolution: nn.Module, activation: nn.Module):
        super().__init__()
        self.convolution = convolution
        self.norm = FrameNorm(convolution.out_channels)
        self.activation = activation

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return (B, C', T, F'); `valid` as in `FrameNorm`."""
        x = self.convolution(x)
        return self.activation(x if self.norm is None else self.norm(x, valid))

    def make_quick(self) -> None:
        """Let the convolution do what the normalisation does in evaluation."""
        self.convolution, self.norm = fold_normalisation(self.convolution, self.norm), None


class TemporalAttention(nn.Module):
    """Weights each channel of a frame by what a GRU makes of the energies so far (the paper's TRA).

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gru = nn.GRU(channels, 2 * channels, batch_first=True)
        self.linear = nn.Linear(2 * channels, channels)

    def forward(self, x: torch.Tensor, state: torch.Tensor | None):
        """Return x (B, C, T, F) weighted, and the state of the GRU after its last frame."""
        energy = x.square().mean(-1).transpose(1, 2)  # (B, T, C)
        y, state = self.gru(energy, state)
        weights = self.linear(y).sigmoid().transpose(1, 2)  # (B, C, T)
        return x * weights.unsqueeze(-1), state

    def make_quick(self) -> None:
        """Let the GRU take single frames without detours."""
        self.gru = MergedGRU([self.gru])


class TemporalBlock(nn.Module):
    """The paper's grouped temporal convolution: half of the channels pass, half are processed.

    The paper's unfolding of three neighbouring bands and the pointwise convolution after it are
    one convolution over three bands.

    Args:
        channels: C.
        dilation: of the convolution over time, in frames.
    """

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        half = channels // 2
        self.before = 2 * dilation  # how many earlier frames it sees
        widen = nn.Conv2d(half, channels, (1, 3), padding=(0, 1))
        self.widen = ConvolutionBlock(widen, nn.PReLU())
        depthwise = nn.Conv2d(
            channels, channels, 3, padding=(0, 1), dilation=(dilation, 1), groups=channels
        )
        self.depthwise = ConvolutionBlock(depthwise, nn.PReLU())
        self.narrow = ConvolutionBlock(nn.Conv2d(channels, half, 1), nn.Identity())
        self.attention = TemporalAttention(half)

    def forward(self, x: torch.Tensor, state: tuple | None, valid: torch.Tensor | None):
        """Process frames.

        Args:
            x: (B, C, T, F).
            state: what an earlier call returned; None at the start.
            valid: as in `FrameNorm`.

        Returns:
            (B, C, T, F), and the state: frames (B, C, `before`, F) and that of the attention.
        """
        x, passed = x.chunk(2, dim=1)
        x = self.widen(x, valid)
        earlier, attention = state or (x.new_zeros(*x.shape[:2], self.before, x.shape[3]), None)
        x = torch.cat([earlier, x], dim=2)  # (B, C, before + T, F)
        earlier = x[:, :, -self.before :]
        x = self.narrow(self.depthwise(x, valid), valid)
        x, attention = self.attention(x, attention)
        # Shuffled: the next block processes half of what this one did, and half of the rest.
        return torch.stack([x, passed], dim=2).flatten(1, 2), (earlier, attention)


class GroupedGRU(nn.Module):
    """Two GRUs side by side, each for half of the features.

    Args:
        size: features D of the input and of the output.
        bidirectional: half of the output is made by each direction.
    """

    def __init__(self, size: int, bidirectional: bool = False):
        super().__init__()
        hidden = size // 4 if bidirectional else size // 2
        self.groups = nn.ModuleList(
            nn.GRU(size // 2, hidden, batch_first=True, bidirectional=bidirectional)
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, state: tuple | None = None):
        """Return outputs (B, L, D) of x (B, L, D), and the states after its last step."""
        parts = zip(self.groups, x.chunk(2, dim=-1), state or (None, None), strict=True)
        outputs, state = zip(*(gru(part, hidden) for gru, part, hidden in parts), strict=True)
        return torch.cat(outputs, dim=-1), state


class DualPathBlock(nn.Module):
    """Recurrence over the bands of a frame, in both directions, then over time.

    Args:
        channels: C.
        bands: F.
    """

    def __init__(self, channels: int, bands: int):
        super().__init__()
        self.over_bands = GroupedGRU(channels, bidirectional=True)
        self.band_linear = nn.Linear(channels, channels)
        self.band_norm = nn.LayerNorm((bands, channels))
        self.over_time = GroupedGRU(channels)
        self.time_linear = nn.Linear(channels, channels)
        self.time_norm = nn.LayerNorm((bands, channels))

    def forward(self, x: torch.Tensor, state: tuple | None):
        """Return (B, C, T, F) of x (B, C, T, F), and the state after its last frame."""
        batch, _, frames, bands = x.shape
        x = x.permute(0, 2, 3, 1)  # (B, T, F, C)
        y, _ = self.over_bands(x.flatten(0, 1))  # (B T, F, C)
        x = x + self.band_norm(self.band_linear(y).unflatten(0, (batch, frames)))
        y, state = self.over_time(x.transpose(1, 2).flatten(0, 1), state)  # (B F, T, C)
        y = self.time_linear(y).unflatten(0, (batch, bands)).transpose(1, 2)  # (B, T, F, C)
        return (x + self.time_norm(y)).permute(0, 3, 1, 2), state

    def make_quick(self) -> None:
        """Let the two GRUs of each recurrence be one."""
        self.over_bands = MergedGRU(self.over_bands.groups)
        self.over_time = MergedGRU(self.over_time.groups)


class GTCRNSeparator(AbsSeparator):
    """GTCRN as an ESPnet separator, causal and streaming.

    `tap` stands between the two dual-path blocks: (B, channels, T, bands / 4).

    Args:
        input_dim: bins of the STFT.
        num_spk: how many spectra to estimate.
        channels: of the convolutions, a multiple of 4.
        sample_rate: in Hz, for the layout of the bands.

    Raises:
        CmktError: settings that do not fit each other.
    """

    def __init__(
        self, input_dim: int, num_spk: int = 1, channels: int = 16, sample_rate: int = 16000
    ):
        super().__init__()
        if channels < 4 or channels % 4:
            raise CmktError(
                f"separator_conf.channels is {channels}", remedy="take a multiple of 4, as 16"
            )
        self._num_spk = num_spk
        self.bands = Bands(input_dim, sample_rate)
        over = {"kernel_size": (1, 5), "stride": (1, 2), "padding": (0, 2)}
        half, quarter = (self.bands.count + 1) // 2, (self.bands.count + 3) // 4
        assert 2 * (2 * quarter - 1) - 1 == 2 * half - 1 == self.bands.count
        self.encoder = nn.ModuleList(
            [
                ConvolutionBlock(nn.Conv2d(3 * 3, channels, **over), nn.PReLU()),
                ConvolutionBlock(nn.Conv2d(channels, channels, groups=2, **over), nn.PReLU()),
                *(TemporalBlock(channels, dilation) for dilation in DILATIONS),
            ]
        )
        self.dual_paths = nn.ModuleList(DualPathBlock(channels, quarter) for _ in range(2))
        self.tap = nn.Identity()
        wider = nn.ConvTranspose2d(channels, channels, groups=2, **over)
        masks = nn.ConvTranspose2d(channels, 2 * num_spk, **over)
        self.decoder = nn.ModuleList(
            [
                *(TemporalBlock(channels, dilation) for dilation in reversed(DILATIONS)),
                ConvolutionBlock(wider, nn.PReLU()),
                ConvolutionBlock(masks, nn.Tanh()),
            ]
        )

    @property
    def num_spk(self) -> int:
        """How many spectra are estimated."""
        return self._num_spk

    def forward(self, input, ilens: torch.Tensor, additional: dict | None = None):
        """Enhance whole utterances.

        Args:
            input: complex spectrum (B, T, F).
            ilens: (B,) valid frames.
            additional: not used.

        Returns:
            spectra [(B, T, F), ...], `ilens`, and the masks `mask_spk1` ... (B, T, F), complex.

        Raises:
            CmktError: no complex spectrum of one channel.
        """
        valid, frames = None, input.shape[1]
        if self.training and bool((ilens < frames).any()):
            valid = lengths_to_mask(ilens.to(input.real.device), frames).flatten().nonzero()[:, 0]
        spectra, _, others = self._process(input, None, valid)
        return spectra, ilens, others

    def forward_streaming(self, input_frame, states=None):
        """Enhance the next frames of a stream, always as in evaluation mode.

        The weights are those at the start of the stream: its states hold a quick copy of the
        network.

        Args:
            input_frame: complex spectrum (B, 1, F), or more frames than one.
            states: what the call for the frames before returned; None at the start.

        Returns:
            spectra [(B, 1, F), ...], the states for the next call, and the masks as of `forward`.
        """
        network, earlier = states or (self._quick_copy(), None)
        spectra, later, others = network._process(input_frame, earlier, None)
        return spectra, (network, later), others

    def _quick_copy(self) -> "GTCRNSeparator":
        """Return a network that does the same to single frames in less time."""
        network = copy.deepcopy(self).eval().requires_grad_(False)
        for part in list(network.modules()):
            if hasattr(part, "make_quick"):
                part.make_quick()
        return network

    def _process(self, input, states: list | None, valid: torch.Tensor | None):
        """Enhance frames; `states` are those of the blocks, `valid` is as in `FrameNorm`."""
        require_spectrum("gtcrn", input)
        earlier, states = iter(states) if states else repeat(None), []
        real, imaginary = input.real, input.imag
        # The magnitude has a gradient at 0 too.
        magnitude = (real.square() + imaginary.square() + 1e-12).sqrt()
        x = self.bands.merge(torch.stack([magnitude, real, imaginary], dim=1))  # (B, 3, T, bands)
        wide = nn.functional.pad(x, (1, 1))
        x = torch.cat([wide[..., :-2], x, wide[..., 2:]], dim=1)  # (B, 9, T, bands)
        skipped = []
        for block in self.encoder:
            x = self._run(block, x, earlier, states, valid)
            skipped.append(x)
        first, second = self.dual_paths
        x, state = first(x, next(earlier))
        states.append(state)
        x, state = second(self.tap(x), next(earlier))  # (B, channels, T, bands / 4)
        states.append(state)
        for block in self.decoder:
            x = self._run(block, x + skipped.pop(), earlier, states, valid)
        masks = self.bands.split(x).to(real.dtype).chunk(self.num_spk, dim=1)  # each (B, 2, T, F)
        spectra, others = [], OrderedDict()
        for number, mask in enumerate(masks, 1):
            a, b = mask.unbind(dim=1)
            product = real * a - imaginary * b, real * b + imaginary * a
            spectra.append(new_complex_like(input, product))
            others[f"mask_spk{number}"] = new_complex_like(input, (a, b))
        return spectra, states, others

    @staticmethod
    def _run(block: nn.Module, x: torch.Tensor, earlier, states: list, valid) -> torch.Tensor:
        """Run a block of the encoder or decoder, and pass its state on if it has one."""
        if isinstance(block, ConvolutionBlock):
            return block(x, valid)
        x, state = block(x, next(earlier), valid)
        states.append(state)
        return x
