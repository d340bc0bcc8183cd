"""Loads an export and enhances signals that fit into memory."""

from pathlib import Path

import numpy as np

from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import build_enhancement_model
from cmkt.settings import read_mapping

# Their encoders and decoders scale the STFT with the sampling rate, which they must be told.
RATE_AWARE = ("BSRNNSeparator", "TFGridNetV3", "USESSeparator")
EXPORT_FILES = ("config.yaml", "model.pth", "meta.yaml")


def check_export(folder: str | Path) -> dict:
    """Check that a folder is an export and read its meta.yaml.

    Args:
        folder: as made by `cmkt export`.

    Returns:
        the contents of meta.yaml.

    Raises:
        CmktError: no such folder, or a file of it is missing or not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CmktError("no such model folder", folder, remedy="run stage 6 (cmkt export)")
    for name in EXPORT_FILES:
        if not (folder / name).exists():
            inner = folder / "export"
            raise CmktError(
                f"not an export: no {name} in it",
                folder,
                remedy=f"give {inner}" if inner.is_dir() else "run stage 6 (cmkt export) again",
            )
    meta = read_mapping(folder / "meta.yaml")
    if not isinstance(meta.get("sample_rate"), int):
        raise CmktError(
            "sample_rate is not set", folder / "meta.yaml", remedy="run stage 6 (cmkt export) again"
        )
    return meta


def read_weights(path: Path) -> dict:
    """Read a state dict of tensors, refusing anything else that a pickle may hold.

    Returns:
        {name: tensor}, on the CPU.

    Raises:
        CmktError: not such a file.
    """
    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, EOF and runtime errors here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CmktError(
            f"not readable as model weights: {reason}", path, remedy="make the file again"
        ) from error
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise CmktError("holds more than model weights", path, remedy="give a model, not a state")
    return weights


def load_strictly(model, weights: dict, path: Path) -> None:
    """Load weights into a model; each must be there, none may be left over.

    Raises:
        CmktError: missing, unexpected or misshapen weights; names the first.
    """
    expected = model.state_dict()
    for problem, names in (
        ("missing", [name for name in expected if name not in weights]),
        ("unexpected", [name for name in weights if name not in expected]),
        ("of another shape", [n for n in expected if weights[n].shape != expected[n].shape]
         if expected.keys() == weights.keys() else []),
    ):  # fmt: skip
        if names:
            raise CmktError(
                f"{len(names)} weights are {problem}, the first is {names[0]}",
                path,
                remedy="weights and config.yaml belong to different models",
            )
    model.load_state_dict(weights, strict=True)


class Enhancer:
    """An exported model, ready to enhance.

    Args:
        folder: an export: config.yaml, model.pth, meta.yaml.
        device: for example `cpu` or `cuda:0`.

    Attributes:
        sample_rate: rate of the signals it takes and gives, in Hz.

    Example:
        enhanced = Enhancer("exp/blstm_seed0/export")(noisy)
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        folder = Path(folder)
        self.sample_rate: int = check_export(folder)["sample_rate"]
        self.model = build_enhancement_model(read_mapping(folder / "config.yaml"))
        load_strictly(self.model, read_weights(folder / "model.pth"), folder / "model.pth")
        if self.model.num_spk != 1:
            raise CmktError(
                f"separates {self.model.num_spk} speakers", folder, remedy="give a num_spk: 1 model"
            )
        try:
            self.model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise CmktError(f"--device {device}: {reason}", remedy="use --device cpu") from error
        self.device = device

    @property
    def normalises(self) -> bool:
        """Whether the model sees its input divided by its standard deviation."""
        return self.model.normalize_variance or self.model.normalize_variance_per_ch

    def __call__(self, speech: np.ndarray, scale: float | None = None) -> np.ndarray:
        """Enhance one channel, exactly as ESPnet's `SeparateSpeech` does.

        Args:
            speech: (N,) float32 samples at `sample_rate`.
            scale: standard deviation to normalise with, if `normalises`; default: that of
                `speech`. Segments of one recording must share one.

        Returns:
            (N,) float32 samples at the level of the input. Silence gives silence, where stock
            ESPnet divides by a standard deviation of zero.
        """
        import torch
        from torchaudio.functional import resample

        if not speech.any() or (self.normalises and len(speech) < 2):
            return np.zeros_like(speech)
        mixture = torch.from_numpy(speech)[None].to(self.device)  # (1, N)
        rate = self.sample_rate if type(self.model.separator).__name__ in RATE_AWARE else None
        wide = rate is None and self.model.always_forward_in_48k
        if wide:
            mixture = resample(mixture, self.sample_rate, 48000)
        deviation = 1.0
        if self.normalises:
            deviation = torch.std(mixture, dim=1, keepdim=True)
            if scale is not None:
                deviation = torch.full_like(deviation, scale)
            if not deviation > 0:  # a constant
                return np.zeros_like(speech)
            mixture = mixture / deviation
        missing = max(0, _shortest(self.model.encoder) - mixture.shape[1])
        mixture = torch.nn.functional.pad(mixture, (0, missing))
        lengths = torch.tensor([mixture.shape[1]], device=self.device)
        with torch.no_grad():
            features, feature_lengths = self.model.encoder(mixture, lengths, fs=rate)
            features, _, _ = self.model.separator(features, feature_lengths, {})
            enhanced = self.model.decoder(features[0], lengths, fs=rate)[0] * deviation
        if wide:
            enhanced = resample(enhanced, 48000, self.sample_rate)
        return enhanced[0, : len(speech)].cpu().numpy()


def _shortest(encoder) -> int:
    """Return how many samples the encoder needs: an STFT reflects half a window at each end."""
    stft = getattr(encoder, "stft", None)
    return stft.n_fft // 2 + 1 if stft is not None else getattr(encoder, "kernel_size", 1)
