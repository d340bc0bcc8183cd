"""Rivals of the transfer that need no text: distances inside a frozen network (docs/rivals.md).

They are criterions of ESPnet: each compares the enhanced waveform with the clean one, beside the
enhancement loss and, where it is on, the transfer.
"""

import math
from collections.abc import Callable

import torch
import torchaudio
from espnet2.enh.loss.criterions.time_domain import TimeDomainLoss
from torch import nn
from torch.nn.functional import cosine_similarity

from cmkt.errors import CmktError
from cmkt.espnet_plugin.ctc import load_recogniser, read_recogniser
from cmkt.espnet_plugin.rivals import RIVALS
from cmkt.espnet_plugin.speech_encoder import find_encoder, load_encoder
from cmkt.transfer.sequences import lengths_to_mask
from cmkt.transfer.settings import choice, whole


def _divergence(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    found, wanted = found.log_softmax(-1), wanted.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)


# What is enhanced and what is clean (B, T, D) to distances (B, T).
DISTANCES: dict[str, Callable] = {
    "l1": lambda found, wanted: (found - wanted).abs().mean(-1),
    "mse": lambda found, wanted: (found - wanted).square().mean(-1),
    "cosine": lambda found, wanted: 1 - cosine_similarity(found, wanted, dim=-1),
    "kl": _divergence,
}


class RivalLoss(TimeDomainLoss):
    """Mean distance, over the valid frames, of what a frozen network makes of two waveforms.

    ESPnet hands a criterion no lengths and pads with zeros, so an utterance ends with the last
    sample of the clean speech that is not zero. The network is no submodule: no optimiser,
    checkpoint or export sees it. It is loaded, once a device, when it is first needed.

    Args:
        name: under which the loss is logged.
        load: returns the network: (speech (B, N), lengths (B,)) to (states (B, T, D), frames (B,)).
        network_fs: its sampling rate in Hz.
        distance: a key of `DISTANCES`.
        fs: sampling rate of the waveforms in Hz.
    """

    is_rival = True  # kept out of `loss_se`

    def __init__(
        self, name: str, load: Callable[[], nn.Module], network_fs: int, distance: str, fs: int
    ):
        super().__init__(name)
        self.load, self.network_fs, self.fs = load, network_fs, whole(f"{name}.fs", fs, 1)
        self.distance = DISTANCES[distance]
        self.networks: dict[torch.device, tuple[nn.Module]] = {}  # DataParallel has one a GPU

    def forward(self, ref: torch.Tensor, inf: torch.Tensor) -> torch.Tensor:
        """Return the loss of each utterance (B,).

        Args:
            ref: (B, N) clean samples, zeros beyond the valid ones.
            inf: (B, N) enhanced samples.
        """
        places = torch.arange(1, ref.shape[1] + 1, device=ref.device)
        lengths = (places * ref.ne(0)).amax(1)
        inf = inf.masked_fill(~lengths_to_mask(lengths, ref.shape[1]), 0)
        with torch.no_grad():
            wanted, _ = self._states(ref, lengths)
        found, frames = self._states(inf, lengths)
        valid = lengths_to_mask(frames, found.shape[1])
        # Filled first: what a network makes of padding may be no number.
        found, wanted = (x.float().masked_fill(~valid[..., None], 1.0) for x in (found, wanted))
        return (self.distance(found, wanted) * valid).sum(1) / frames.clamp(min=1)

    def _states(self, speech: torch.Tensor, lengths: torch.Tensor):
        speech = speech.float()
        if self.fs != self.network_fs:
            speech = torchaudio.functional.resample(speech, self.fs, self.network_fs)
            divisor = math.gcd(self.fs, self.network_fs)
            up, down = self.network_fs // divisor, self.fs // divisor
            lengths = (lengths * up + down - 1) // down
        return self._network(speech.device)(speech, lengths)

    def _network(self, device: torch.device) -> nn.Module:
        if device not in self.networks:
            # Loading must not change the random numbers of the training.
            with torch.random.fork_rng(devices=[]):
                network = self.load()
            # In a tuple, since a module would become a part of this one.
            self.networks[device] = (network.to(device).eval().requires_grad_(False),)
        return self.networks[device][0]


class SpeechEncoderLoss(RivalLoss):
    """Feature matching on a layer of a pretrained speech encoder.

    Kataria et al. (2010.11860); Close et al., "Perceive and predict" (2301.04388).

    Args:
        model: a WavLM, HuBERT, wav2vec 2.0, Whisper or a similar encoder of transformers, by folder
            or Hugging Face name.
        layer: 0 is the first layer's input, n the output of layer n, -1 that of the last.
        distance: `l1`, mean absolute difference; `mse`; or `cosine`, 1 - cos of each frame.
        fs: sampling rate of the waveforms in Hz; `cmkt train` fills it in.
        name: under which the loss is logged; two of a kind need two names.

    Raises:
        CmktError: no such encoder or layer.
        ValueError: a wrong value.
    """

    def __init__(
        self,
        model: str,
        layer: int = -1,
        distance: str = "l1",
        fs: int = 16000,
        name: str = "speech_encoder",
    ):
        choice("speech_encoder.distance", distance, ("l1", "mse", "cosine"))
        found = find_encoder(model, layer)
        super().__init__(
            name, lambda: load_encoder(found), found.extractor.sampling_rate, distance, fs
        )


class MimicLoss(RivalLoss):
    """Mimic loss: a recogniser of clean speech shall hear the same in the enhanced speech.

    Bagchi et al., "Spectral feature mapping with mimic loss for robust speech recognition"
    (1803.09816), with characters and CTC in place of senones.

    Args:
        recogniser: folder of `cmkt train-recogniser`.
        distance: `mse` or `l1` of the scores before the softmax, or `kl`, the divergence of the
            enhanced from the clean posteriors.
        fs: sampling rate of the waveforms in Hz; `cmkt train` fills it in.
        name: under which the loss is logged.

    Raises:
        CmktError: no finished recogniser.
        ValueError: a wrong value.
    """

    def __init__(
        self, recogniser: str, distance: str = "mse", fs: int = 16000, name: str = "mimic"
    ):
        choice("mimic.distance", distance, ("mse", "l1", "kl"))
        if not isinstance(recogniser, str):
            raise CmktError(f"mimic.recogniser must be a folder, not {recogniser!r}")
        rate = read_recogniser(recogniser)["sample_rate"]
        super().__init__(name, lambda: load_recogniser(recogniser), rate, distance, fs)


# To be added to the choices of ESPnet's enhancement task.
CRITERIONS = dict(zip(RIVALS, (SpeechEncoderLoss, MimicLoss), strict=True))
