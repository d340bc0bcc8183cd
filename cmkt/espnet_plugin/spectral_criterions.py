"""The multi-level losses of MP-SENet, as criterions of ESPnet.

Lu, Ai, Ling, "MP-SENet" (Interspeech 2023, 2305.13686): compressed magnitudes (weight 0.9), phase
(0.3), compressed complex spectra (0.1), consistency (0.1) and waveforms (0.2). The loss of the
metric discriminator (0.05) is left out: ESPnet's enhancement task does not train adversarially.

Where they meet ESPnet:

- ESPnet compares the spectrum of the enhanced waveform, not what the separator put out. The
  consistency is a matter of the latter, and the phase is best compared there; the wrapper
  `separator_output` hands it on, of a separator that gives it (`mp_senet`).
- ESPnet undoes `normalize_variance` before the losses. The published weights belong to waveforms
  of one level, so both sides are scaled by the level of the clean one.
- ESPnet pads with zeros and hands a criterion no lengths. Spectra end where both sides have zeros
  only, and the loss is the mean over what is valid.
"""

import math

import torch
from espnet2.enh.loss.criterions.abs_loss import AbsEnhLoss
from espnet2.enh.loss.criterions.tf_domain import FrequencyDomainLoss
from espnet2.enh.loss.criterions.time_domain import TimeDomainLoss
from espnet2.enh.loss.wrappers.abs_wrapper import AbsLossWrapper

from cmkt.errors import CmktError
from cmkt.transfer.sequences import lengths_to_mask
from cmkt.transfer.settings import choice, number, whole

# Added to squared magnitudes, so that powers have a gradient at 0.
FLOOR = 1e-9
# The scale takes the clean level for no less than this share of the enhanced one (-40 dB).
LEAST_SHARE = 1e-2
# Bins this far below an utterance's mean level (-40 dB) have next to no gradient of the phase.
PHASE_FLOOR = 1e-2


def anti_wrap(angle: torch.Tensor) -> torch.Tensor:
    """Return the size, from 0 to pi, of an angle in radians: |x - 2 pi round(x / 2 pi)|.

    Ai and Ling, "Neural speech phase prediction based on parallel estimation architecture and
    anti-wrapping losses" (2211.15974).
    """
    return (angle - 2 * math.pi * torch.round(angle / (2 * math.pi))).abs()


def compress(spectrum, exponent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Raise the magnitude of a complex spectrum to a power, and keep its phase.

    Returns:
        real and imaginary part.
    """
    real, imaginary = spectrum.real.float(), spectrum.imag.float()
    gain = (real.square() + imaginary.square() + FLOOR) ** ((exponent - 1) / 2)
    return real * gain, imaginary * gain


def _power(spectrum) -> torch.Tensor:
    return spectrum.real.float().square() + spectrum.imag.float().square()


def _valid_frames(*values: torch.Tensor) -> torch.Tensor:
    """Return (B, T), true up to the last step where one of the values (B, T, ...) is not 0."""
    some = torch.stack([value.detach().flatten(2).ne(0).any(2) for value in values]).any(0)
    steps = torch.arange(1, some.shape[1] + 1, device=some.device)
    return lengths_to_mask((steps * some).amax(1), some.shape[1])


def _masked_mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return (B,): the mean of the values (B, T, ...) where `counted` is true, else 0."""
    counted = counted.expand_as(values)
    total = values.masked_fill(~counted, 0).flatten(1).sum(1)
    return total / counted.flatten(1).sum(1).clamp(min=1)


def _like(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return a mask (B, T) with the dimensions of the values (B, T, ...)."""
    return mask.view(*mask.shape, *[1] * (values.ndim - 2))


def _scale(reference: torch.Tensor, enhanced: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return 1 / level of the reference, from powers (B, T, ...), as (B, 1, ...)."""
    with torch.no_grad():
        clean, other = (_masked_mean(power, counted) for power in (reference, enhanced))
        # Against silence, or nearly, the enhanced level counts: the loss stays bounded.
        level = torch.maximum(clean, LEAST_SHARE**2 * other).sqrt()
        scale = torch.where(level > 0, 1 / level.clamp(min=1e-20), 1.0)
    return scale.view(-1, *[1] * (reference.ndim - 1))


class SpectralLoss(FrequencyDomainLoss):
    """A loss on complex spectra (B, T, F), whatever their encoder."""

    @property
    def compute_on_mask(self) -> bool:
        """False: spectra are compared, not masks."""
        return False

    @property
    def mask_type(self) -> None:
        """None: there is no mask."""
        return None


class CompressedLoss(SpectralLoss):
    """A loss on spectra with compressed magnitudes, at the level of the clean speech.

    Both spectra are scaled as if the clean waveform had a root mean square of 1 and a Hann window
    of 2 (F - 1) samples, as the paper's; loud utterances then count as much as others.

    Args:
        name: under which the loss is logged.
        compression: exponent of the magnitude.

    Raises:
        ValueError: a wrong exponent.
    """

    def __init__(self, name: str, compression: float = 0.3):
        super().__init__(name)
        self.compression = number(f"{name}.compression", compression, 0, 1, above=True)

    def compressed(self, ref, inf):
        """Return both spectra compressed, as (real, imaginary), and the valid frames (B, T)."""
        powers = _power(ref), _power(inf)
        valid = _valid_frames(*powers)
        # White noise of variance 1 has the power sum w^2 = 3/8 N in each bin, w a Hann window.
        level = math.sqrt(0.75 * max(ref.shape[-1] - 1, 1))
        scale = level * _scale(*powers, _like(valid, powers[0]))
        return *(compress(x * scale, self.compression) for x in (ref, inf)), valid


class CompressedMagnitudeLoss(CompressedLoss):
    """Mean squared difference of compressed magnitudes.

    Args:
        compression: exponent of the magnitude.
        name: under which the loss is logged.
    """

    def __init__(self, compression: float = 0.3, name: str = "compressed_magnitude"):
        super().__init__(name, compression)

    def forward(self, ref, inf) -> torch.Tensor:
        """Return the loss of each utterance (B,) from clean and enhanced spectra (B, T, F)."""
        *spectra, valid = self.compressed(ref, inf)
        # The floor gives the root a gradient at 0; it cancels between equal spectra.
        clean, enhanced = ((a.square() + b.square() + FLOOR).sqrt() for a, b in spectra)
        return _masked_mean((clean - enhanced).square(), _like(valid, clean))


class CompressedComplexLoss(CompressedLoss):
    """Squared difference of compressed complex spectra, summed over real and imaginary part.

    Args:
        compression: exponent of the magnitude.
        name: under which the loss is logged.
    """

    def __init__(self, compression: float = 0.3, name: str = "compressed_complex"):
        super().__init__(name, compression)

    def forward(self, ref, inf) -> torch.Tensor:
        """Return the loss of each utterance (B,) from clean and enhanced spectra (B, T, F)."""
        (real, imaginary), (other_real, other_imaginary), valid = self.compressed(ref, inf)
        error = (real - other_real).square() + (imaginary - other_imaginary).square()
        return _masked_mean(error, _like(valid, error))


class AntiWrappingPhaseLoss(SpectralLoss):
    """Mean anti-wrapped error of phase, group delay and instantaneous angular frequency, summed.

    Group delay and angular frequency are differences of the phase along frequency and along time.
    Where the clean spectrum is 0 it has no phase; such bins, and the padding, do not count.
    The level does not matter, so it can be used with `wrapper: separator_output`.

    Args:
        name: under which the loss is logged.
    """

    on_separator_output = True

    def __init__(self, name: str = "anti_wrapping_phase"):
        super().__init__(name)

    def forward(self, ref, inf) -> torch.Tensor:
        """Return the loss of each utterance (B,) in radians from spectra (B, T, F)."""
        error = _phase(inf) - _phase(ref)
        counted = _power(ref) > 0
        along_frequency = counted[..., 1:] & counted[..., :-1]
        along_time = counted[:, 1:] & counted[:, :-1]
        return (
            _masked_mean(anti_wrap(error), counted)
            + _masked_mean(anti_wrap(error.diff(dim=-1)), along_frequency)
            + _masked_mean(anti_wrap(error.diff(dim=1)), along_time)
        )


def _phase(spectrum) -> torch.Tensor:
    """Return the phase, with a gradient that is bounded, and 0 at 0.

    The gradient of an angle grows as 1 / |X| without bound, so that bins in which there is next to
    nothing would rule the training: here it is that of a magnitude sqrt(|X|^2 + floor^2).
    """
    real, imaginary = spectrum.real.float(), spectrum.imag.float()
    with torch.no_grad():
        phase = torch.atan2(imaginary + 0.0, real)
        power = real.square() + imaginary.square()
        level = power.flatten(1).mean(1).view(-1, *[1] * (power.ndim - 1))
        gain = 1 / (power + PHASE_FLOOR**2 * level + 1e-20)
    # The second term is 0; its gradient is the one of the angle.
    return phase + (real.detach() * imaginary - imaginary.detach() * real) * gain


class ConsistencyLoss(SpectralLoss):
    """Squared distance of a spectrum from that of the waveform made of it, both compressed.

    It needs `wrapper: separator_output`, whose spectra are compressed. Frames at an utterance's
    end, whose waveform depends on what follows, do not count.

    Args:
        n_fft: as in `encoder_conf`, like the following.
        hop_length: samples.
        win_length: samples; as `n_fft` by default.
        window: `hann`, or another of torch.
        compression: exponent of the separator's compression.
        name: under which the loss is logged.

    Raises:
        ValueError: a wrong value.
    """

    on_separator_output = True

    def __init__(
        self,
        n_fft: int = 400,
        hop_length: int = 100,
        win_length: int | None = None,
        window: str = "hann",
        compression: float = 0.3,
        name: str = "consistency",
    ):
        super().__init__(name)
        self.compression = number("consistency.compression", compression, 0, 1, above=True)
        self.stft = {
            "n_fft": whole("consistency.n_fft", n_fft, 2),
            "hop_length": whole("consistency.hop_length", hop_length, 1),
            "win_length": whole("consistency.win_length", win_length or n_fft, 1),
        }
        choice("consistency.window", window, ("hann", "hamming", "blackman", "bartlett"))
        self.window = getattr(torch, f"{window}_window")

    def forward(self, ref, inf) -> torch.Tensor:
        """Return the loss of each utterance (B,).

        Args:
            ref: not used.
            inf: (B, T, F) compressed spectra, as the separator put them out.

        Raises:
            CmktError: the spectra are of another STFT.
        """
        n_fft, hop_length = self.stft["n_fft"], self.stft["hop_length"]
        if inf.shape[-1] != n_fft // 2 + 1:
            raise CmktError(
                f"consistency: spectra of {inf.shape[-1]} frequencies are not of n_fft {n_fft}",
                remedy="give it the n_fft, hop_length and window of encoder_conf",
            )
        real, imaginary = inf.real.float(), inf.imag.float()  # (B, T, F)
        # Frames whose every overlapping frame is there.
        lengths = _valid_frames(_power(inf)).sum(1) - math.ceil(n_fft / hop_length) + 1
        counted = lengths_to_mask(lengths, inf.shape[1])
        if not counted.any():
            return (real + imaginary).flatten(1).sum(1) * 0
        window = self.window(self.stft["win_length"], device=real.device)
        gain = (real.square() + imaginary.square() + FLOOR) ** ((1 / self.compression - 1) / 2)
        spectrum = torch.complex(real * gain, imaginary * gain).transpose(1, 2)
        waveform = torch.istft(spectrum, **self.stft, window=window)
        again = torch.stft(waveform, **self.stft, window=window, return_complex=True)
        other_real, other_imaginary = compress(again.transpose(1, 2), self.compression)
        error = (real - other_real).square() + (imaginary - other_imaginary).square()
        return _masked_mean(error, counted[..., None])


class RelativeL1Loss(TimeDomainLoss):
    """Mean absolute difference of waveforms, in units of the clean one's root mean square.

    An utterance ends with the last clean sample that is not 0: what a decoder leaves in the
    padding is not exactly 0.

    Args:
        name: under which the loss is logged.
    """

    def __init__(self, name: str = "relative_l1"):
        super().__init__(name)

    def forward(self, ref: torch.Tensor, inf: torch.Tensor) -> torch.Tensor:
        """Return the loss of each utterance (B,) from clean and enhanced samples (B, N)."""
        ref, inf = ref.float(), inf.float()
        valid = _like(_valid_frames(ref[..., None]), ref)
        valid = valid | ~valid.any(1, keepdim=True)  # all of it where all is silent
        scale = _scale(ref.square(), inf.square(), valid)
        return _masked_mean((ref - inf).abs() * scale, valid)


class SeparatorOutputSolver(AbsLossWrapper):
    """ESPnet's `fixed_order`, but of the compressed spectra that the separator put out.

    Args:
        criterion: `consistency` or `anti_wrapping_phase`, which do not depend on the level:
            the separator's is that of the noisy speech after `normalize_variance`.
        weight: of the criterion.

    Raises:
        CmktError: another criterion.
    """

    def __init__(self, criterion: AbsEnhLoss, weight: float = 1.0):
        super().__init__()
        if not getattr(criterion, "on_separator_output", False):
            raise CmktError(
                f"criterions: {criterion.name} cannot be had of the separator's output",
                remedy="use wrapper: fixed_order",
            )
        self.criterion, self.weight = criterion, weight

    def forward(self, ref: list, inf: list, others: dict):
        """Compute the loss.

        Args:
            ref: clean spectra (B, T, F), one a speaker.
            inf: not used.
            others: what the separator returned beside the spectra, with `compressed_spk<n>`.

        Returns:
            loss, {name: loss} to log, and an empty dict.

        Raises:
            CmktError: the separator gives no compressed spectra.
        """
        keys = [f"compressed_spk{speaker + 1}" for speaker in range(len(ref))]
        if any(key not in others for key in keys):
            raise CmktError(
                f"criterions: {self.criterion.name} with wrapper separator_output needs a "
                "separator that gives its compressed spectra",
                remedy="use separator mp_senet, or leave this criterion out",
            )
        pairs = zip(ref, (others[key] for key in keys), strict=True)
        loss = torch.stack([self.criterion(*pair).mean() for pair in pairs]).mean()
        return loss, {self.criterion.name: loss.detach()}, {}


# To be added to the choices of ESPnet's enhancement task.
SPECTRAL_CRITERIONS = {
    "compressed_magnitude": CompressedMagnitudeLoss,
    "compressed_complex": CompressedComplexLoss,
    "anti_wrapping_phase": AntiWrappingPhaseLoss,
    "consistency": ConsistencyLoss,
    "relative_l1": RelativeL1Loss,
}
SPECTRAL_WRAPPERS = {"separator_output": SeparatorOutputSolver}
