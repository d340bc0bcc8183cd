"""Enhances a signal while it arrives, with the delay of one window of the STFT."""

from pathlib import Path

import numpy as np

from cmkt.enhance.loading import Enhancer
from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import can_stream

REMEDY = "train a causal separator that streams, as conf/train_gtcrn.yaml"
CHECK_SECONDS = 0.5
TOLERANCE = 1e-4  # of the largest sample


class StreamingEnhancer:
    """An exported model that takes a signal piece by piece.

    What it returns, put together, is what `Enhancer` makes of the whole signal. That is checked
    on half a second of noise when the model is loaded, so a model that looks ahead is refused.
    It runs on the CPU; one thread (`torch.set_num_threads(1)`) is the fastest.

    Args:
        folder: an export: config.yaml, model.pth, meta.yaml.

    Attributes:
        sample_rate: rate of the signals it takes and gives, in Hz.
        latency: in samples; a sample is returned at the latest by the call that brings the sample
            so much later.

    Raises:
        CmktError: no such export, or a model whose output needs more of the signal than it has
            so far.

    Example:
        stream = StreamingEnhancer("exp/gtcrn_seed0/export")
        for piece in pieces:
            play(stream.push(piece))
        play(stream.flush())
    """

    def __init__(self, folder: str | Path):
        import torch
        from torch.nn import functional

        enhancer = Enhancer(folder)
        self.sample_rate, self.model = enhancer.sample_rate, enhancer.model
        if enhancer.normalises or self.model.always_forward_in_48k:
            raise CmktError(
                "does not stream: model_conf makes it scale or resample whole signals",
                folder,
                remedy="train with normalize_variance: false, as conf/train_gtcrn.yaml",
            )
        stft = getattr(self.model.encoder, "stft", None)
        if stft is None:
            raise CmktError("does not stream: its encoder is no STFT", folder, remedy=REMEDY)
        if not can_stream(self.model.separator):
            name = type(self.model.separator).__name__
            raise CmktError(f"does not stream: {name} cannot", folder, remedy=REMEDY)
        self.latency, self._hop = stft.n_fft, stft.hop_length
        self._half = stft.n_fft // 2
        window = getattr(torch, f"{stft.window}_window")(stft.win_length)
        left = (stft.n_fft - stft.win_length) // 2
        self._window = functional.pad(window, (left, stft.n_fft - stft.win_length - left))
        self.reset()
        self._check(enhancer, folder)

    def reset(self) -> None:
        """Forget the signal so far."""
        import torch

        self._states = None
        self._given = self._returned = 0
        self._waiting = torch.zeros(0)  # of the padded signal, from the start of the next frame
        self._tail = torch.zeros(0)  # the end of the signal, which is reflected after it
        # Windowed output of the frames so far, and what the squared windows add up to.
        self._sum, self._weight = torch.zeros(2, self.latency)
        self._surplus = self._half  # samples to drop: the output of the reflection at the start

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Take the next samples of the signal.

        Args:
            samples: (N,), any number of them, at `sample_rate`.

        Returns:
            (M,) float32, the enhanced samples that follow those returned before.

        Raises:
            CmktError: not a row of finite numbers.
        """
        import torch

        samples = np.asarray(samples, np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise CmktError("a stream takes finite samples of one channel")
        started = self._given > self._half
        piece = torch.from_numpy(samples.copy())
        self._given += len(piece)
        self._tail = torch.cat([self._tail, piece])[-self._half - 1 :]
        self._waiting = torch.cat([self._waiting, piece])
        if self._given <= self._half:  # the encoder reflects half a window at the start
            return np.zeros(0, np.float32)
        if not started:
            reflected = self._waiting[1 : self._half + 1].flip(0)
            self._waiting = torch.cat([reflected, self._waiting])
        return self._run()

    def flush(self) -> np.ndarray:
        """End the signal: return the rest of it (M,), and be ready for another."""
        import torch

        length, returned = self._given, self._returned
        parts = [np.zeros(0, np.float32)]
        if length and length <= self._half:  # as `Enhancer` does with less than half a window
            parts.append(self.push(np.zeros(self._half + 1 - length)))
        if length:
            reflected = self._tail[:-1].flip(0)
            self._waiting = torch.cat([self._waiting, reflected])
            parts.append(self._run())
            rest = self._sum / self._weight
            parts.append(rest[self._surplus :].numpy())
        self.reset()
        return np.concatenate(parts)[: length - returned]

    def _run(self) -> np.ndarray:
        """Enhance all frames that are complete, and return what is final of the output."""
        import torch

        encoder, separator, decoder = self.model.encoder, self.model.separator, self.model.decoder
        ready = [torch.zeros(0)]
        with torch.inference_mode():
            while len(self._waiting) >= self.latency:
                spectrum = torch.fft.rfft(self._waiting[: self.latency] * self._window)
                spectrum = encoder.spec_transform_func(spectrum[None, None])  # (1, 1, F)
                spectra, self._states, _ = separator.forward_streaming(spectrum, self._states)
                spectrum = decoder.spec_back(spectra[0])[0, 0]
                self._sum += torch.fft.irfft(spectrum, self.latency) * self._window
                self._weight += self._window.square()
                ready.append(self._sum[: self._hop] / self._weight[: self._hop])
                for total in (self._sum, self._weight):
                    total[: -self._hop] = total[self._hop :].clone()
                    total[-self._hop :] = 0
                self._waiting = self._waiting[self._hop :]
        samples = torch.cat(ready)
        surplus = min(self._surplus, len(samples))
        self._surplus -= surplus
        self._returned += len(samples) - surplus
        return samples[surplus:].numpy()

    def _check(self, enhancer: Enhancer, folder: str | Path) -> None:
        """Compare with the whole signal, on noise."""
        noise = np.random.default_rng(0).normal(0, 0.1, int(CHECK_SECONDS * self.sample_rate))
        whole = enhancer(noise.astype(np.float32))
        streamed = np.concatenate([self.push(noise), self.flush()])
        if np.abs(streamed - whole).max() > TOLERANCE * np.abs(whole).max():
            raise CmktError(
                "does not stream: frame by frame it gives another signal than on the whole",
                folder,
                remedy=REMEDY,
            )
