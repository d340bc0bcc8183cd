"""One layer of a pretrained speech encoder, with gradients to the waveform.

The feature extractors of transformers work in numpy. Here the same is done in torch, and each
utterance of a batch gets what the encoder makes of it alone, without padding.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cmkt.errors import CmktError
from cmkt.transfer.sequences import lengths_to_mask

# Weights that transformers may make up, since no hidden layer of the encoder uses them.
UNUSED = ("masked_spec_embed", "decoder.", "adapter", "proj_out")


@dataclass(frozen=True)
class EncoderChoice:
    """A layer of an encoder that is on this machine.

    Args:
        folder: configuration, weights and preprocessor_config.json.
        config: of transformers.
        extractor: its feature extractor.
        layer: 0 is the first layer's input, n the output of the nth.
    """

    folder: Path
    config: object
    extractor: object
    layer: int


def find_encoder(model: str, layer: int) -> EncoderChoice:
    """Find a speech encoder, without loading its weights.

    Args:
        model: a local folder, or a Hugging Face name (downloaded once).
        layer: 0 to the number of layers; negative ones count from the last, -1.

    Raises:
        CmktError: it is not there, is no encoder of waveforms, or has no such layer.
    """
    from transformers import AutoConfig, AutoFeatureExtractor

    from cmkt.linguistic.models import find_model

    if not isinstance(model, str) or not model:
        raise CmktError(f"speech_encoder.model must be a name or a folder, not {model!r}")
    try:
        folder = find_model(model).folder
    except CmktError as error:
        raise CmktError(f"speech_encoder.model: {error}") from error
    if not (folder / "preprocessor_config.json").is_file():
        raise CmktError(
            "speech_encoder.model: no preprocessor_config.json, which says how audio is scaled",
            folder,
            remedy="copy the whole folder of the model",
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers has exceptions of many kinds
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise CmktError(f"speech_encoder.model: {reason}", folder) from error
    whisper = config.model_type == "whisper"
    if not whisper and not hasattr(config, "conv_stride"):
        raise CmktError(
            f"speech_encoder.model: {config.model_type} is no encoder of waveforms",
            folder,
            remedy="take one like WavLM, HuBERT, wav2vec 2.0 or Whisper",
        )
    number = config.encoder_layers if whisper else config.num_hidden_layers
    if type(layer) is not int or not -number - 1 <= layer <= number:
        raise CmktError(
            f"speech_encoder.layer: {layer!r}, but the model has {number} layers",
            folder,
            remedy=f"want {-number - 1} to {number}; 0 is the first layer's input",
        )
    return EncoderChoice(folder, config, extractor, layer if layer >= 0 else layer + number + 1)


def load_encoder(choice: EncoderChoice) -> nn.Module:
    """Load an encoder, up to the layer that is wanted.

    Args:
        choice: of `find_encoder`.

    Returns:
        a module in evaluation mode that takes speech (B, N) at the extractor's `sampling_rate`,
        zeros beyond the valid samples, and these (B,); it returns the layer's frames (B, T, D)
        and the valid ones (B,).

    Raises:
        CmktError: transformers cannot load it, or weights are missing.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, report = AutoModel.from_pretrained(
            choice.folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise CmktError(f"speech_encoder.model: {reason}", choice.folder) from error
    missing = sorted(k for k in report["missing_keys"] if not any(u in k for u in UNUSED))
    if missing:
        raise CmktError(
            f"speech_encoder.model: the weights lack {len(missing)} parameters, "
            f"for example {missing[0]}",
            choice.folder,
            remedy="get the complete model",
        )
    kind = _WhisperLayer if choice.config.model_type == "whisper" else _WaveformLayer
    return kind(model, choice).eval()


def _keep_layers(encoder: nn.Module, wanted: int) -> None:
    # One more than is used: a last layer's output passes through a norm that inner ones do not.
    encoder.layers = encoder.layers[: wanted + 1]


class _WaveformLayer(nn.Module):
    """wav2vec 2.0 and its kin: convolutions over samples, then a transformer."""

    def __init__(self, model: nn.Module, choice: EncoderChoice):
        super().__init__()
        self.model, self.layer = model, choice.layer
        self.normalise = bool(choice.extractor.do_normalize)
        self.kernels = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))
        _keep_layers(model.encoder, choice.layer)
        first = model.feature_extractor.conv_layers[0]
        self.norm = None
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            self.norm = first.layer_norm = _ValidGroupNorm(first.layer_norm)

    def forward(self, speech: torch.Tensor, lengths: torch.Tensor):
        needed = 1  # samples for one frame
        for kernel, stride in reversed(self.kernels):
            needed = (needed - 1) * stride + kernel
        enough = lengths >= needed
        lengths = lengths.clamp(min=needed)
        speech = nn.functional.pad(speech, (0, max(0, needed - speech.shape[1])))
        valid = lengths_to_mask(lengths, speech.shape[1])
        if self.normalise:
            mean = speech.sum(1, keepdim=True) / lengths[:, None]
            centred = (speech - mean) * valid
            variance = centred.square().sum(1, keepdim=True) / lengths[:, None]
            speech = centred * (variance + 1e-7).rsqrt()
        frames = lengths
        for number, (kernel, stride) in enumerate(self.kernels):
            frames = (frames - kernel) // stride + 1
            if number == 0 and self.norm is not None:
                self.norm.frames = frames
        states = self.model(
            speech, attention_mask=valid.long(), output_hidden_states=True
        ).hidden_states[self.layer]  # (B, T, D)
        return states, frames * enough


class _ValidGroupNorm(nn.Module):
    """The norm of each channel over time, over the valid frames only.

    Args:
        norm: of the first convolution, one group a channel.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.frames: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        valid = lengths_to_mask(self.frames, x.shape[2])[:, None]  # (B, 1, T)
        count = self.frames[:, None, None]
        mean = (x * valid).sum(2, keepdim=True) / count  # (B, C, 1)
        variance = ((x - mean) * valid).square().sum(2, keepdim=True) / count
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None] + self.bias[
            :, None
        ]


class _WhisperLayer(nn.Module):
    """Whisper's encoder, over log-mel features of 30 s, whatever the length of the speech."""

    def __init__(self, model: nn.Module, choice: EncoderChoice):
        super().__init__()
        self.encoder, self.layer = model.get_encoder(), choice.layer
        _keep_layers(self.encoder, choice.layer)
        extractor = choice.extractor
        self.samples, self.hop = extractor.n_samples, extractor.hop_length
        self.register_buffer("window", torch.hann_window(extractor.n_fft))
        filters = torch.from_numpy(extractor.mel_filters).float().T
        self.register_buffer("filters", filters)  # (mels, frequencies)

    def log_mel(self, speech: torch.Tensor) -> torch.Tensor:
        """Return what `WhisperFeatureExtractor` does: (B, N) to (B, mels, 2 T)."""
        speech = nn.functional.pad(speech, (0, self.samples - speech.shape[1]))  # or cut
        spectrum = torch.stft(
            speech, len(self.window), self.hop, window=self.window, return_complex=True
        )[..., :-1]  # (B, frequencies, 2 T)
        power = spectrum.real.square() + spectrum.imag.square()
        logarithms = (self.filters @ power).clamp(min=1e-10).log10()  # (B, mels, 2 T)
        logarithms = logarithms.maximum(logarithms.amax((1, 2), keepdim=True) - 8)
        return logarithms / 4 + 1

    def forward(self, speech: torch.Tensor, lengths: torch.Tensor):
        states = self.encoder(self.log_mel(speech), output_hidden_states=True)
        states = states.hidden_states[self.layer]  # (B, T, D)
        step = self.samples // states.shape[1]
        return states, ((lengths + step - 1) // step).clamp(max=states.shape[1])
