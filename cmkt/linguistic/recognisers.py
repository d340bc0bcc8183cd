"""Speech recognisers: pocketsphinx, models of transformers, models of ESPnet.

Every one turns one utterance into a text that depends on that utterance alone, so that neither
the order nor the number of jobs changes a transcript.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cmkt.errors import CmktError
from cmkt.linguistic.models import check_device, find_model

KINDS = ("pocketsphinx", "transformers", "espnet")
# Longer audio is given to a CTC model in overlapping pieces, for its memory grows with the square
# of the length. Whisper works in windows of as many seconds.
LONGEST = 30


class Recogniser(Protocol):
    """Turns speech into text; `fs` is the rate in Hz that it wants."""

    fs: int

    def __call__(self, audio: np.ndarray) -> str:
        """Return the text of audio (N,); an empty one if nothing was recognised."""


@dataclass(frozen=True)
class RecogniserChoice:
    """A recogniser that is there but not loaded yet.

    Args:
        kind: one of `KINDS`.
        identity: what its transcripts depend on; JSON-like.
        model: folder or file of the model; None for pocketsphinx, which has one of its own.
        language: of a Whisper model.
        device: a torch device.
    """

    kind: str
    identity: dict
    model: Path | None = None
    language: str | None = None
    device: str = "cpu"

    @classmethod
    def parse(
        cls, name: str, language: str | None = None, device: str = "cpu"
    ) -> "RecogniserChoice":
        """Find a recogniser; the network is tried only for a hub name that is not cached.

        Args:
            name: the value of --recogniser: `pocketsphinx`, `transformers:` and a folder or name
                on the hub, `espnet:` and a folder.
            language: of the speech, for example `zh`; tells a Whisper model what to expect.
            device: a torch device.

        Raises:
            CmktError: it is not there; says how to get it.
        """
        kind, _, model = name.partition(":")
        if kind not in KINDS or (kind == "pocketsphinx") == bool(model):
            raise CmktError(
                f"--recogniser {name}: no such recogniser",
                remedy="pocketsphinx, transformers:<folder or name> or espnet:<folder>",
            )
        if kind == "pocketsphinx":
            return cls(kind, _pocketsphinx_identity(language, device))
        # The kinds are named as their packages, and another version may decode differently.
        identity = {"recogniser": kind, "version": importlib.metadata.version(kind)}
        identity |= {"model": model, "language": language}
        if kind == "espnet":
            from cmkt.espnet_plugin.recogniser import find_espnet_model

            source = {"sha256": _sha256(sorted(find_espnet_model(model).values()))}
            return cls(kind, {**identity, **source}, Path(model), language, device)
        found = find_model(model)
        source = {"revision": found.revision}
        if found.revision is None:
            source = {"sha256": found.weights_sha256()}
        return cls(kind, {**identity, **source}, found.folder, language, device)

    def load(self, threads: int | None = None) -> Recogniser:
        """Load the model.

        Args:
            threads: of torch, where several processes share the machine; None: as many as it likes.

        Raises:
            CmktError: files that cannot be loaded, no such device.
        """
        if self.kind == "pocketsphinx":
            return PocketSphinx()
        _prepare_torch(self.device, threads)
        if self.kind == "espnet":
            from cmkt.espnet_plugin.recogniser import EspnetRecogniser

            return EspnetRecogniser(self.model, self.device)
        return TransformersRecogniser(self.model, self.language, self.device)


def _pocketsphinx_identity(language: str | None, device: str) -> dict:
    if importlib.util.find_spec("pocketsphinx") is None:
        raise CmktError("pocketsphinx is not installed", remedy="pip install 'cmkt[asr]'")
    if language not in (None, "en"):
        raise CmktError(
            f"--language {language}: pocketsphinx brings an English model only",
            remedy="choose another --recogniser",
        )
    if device != "cpu":
        raise CmktError(f"--device {device}: pocketsphinx runs on the CPU", remedy="use --nj")
    version = importlib.metadata.version("pocketsphinx")
    return {"recogniser": "pocketsphinx", "model": "en-us", "version": version}


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _prepare_torch(device: str, threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    check_device(device)


class PocketSphinx:
    """CMU PocketSphinx with its US English model (16 kHz)."""

    fs = 16000

    def __init__(self):
        from pocketsphinx import Decoder

        self.decoder = Decoder(samprate=self.fs, loglevel="FATAL")

    def __call__(self, audio: np.ndarray) -> str:
        """Return the text of audio (N,)."""
        integers = np.clip(np.round(audio * 32768), -32768, 32767).astype("<i2")
        # Without it the state of the features would be the last utterance's.
        self.decoder.reinit_feat()
        self.decoder.start_utt()
        # The whole utterance at once: the cepstral mean is then its own (`cmn: batch`).
        self.decoder.process_raw(integers.tobytes(), full_utt=True)
        self.decoder.end_utt()
        hypothesis = self.decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


class TransformersRecogniser:
    """A CTC or sequence-to-sequence model of transformers.

    Args:
        folder: its configuration, feature extractor, tokenizer and weights.
        language: of a multilingual Whisper model; None: it finds out itself.
        device: a torch device.

    Raises:
        CmktError: files that transformers cannot load, a language that the model does not have.
    """

    def __init__(self, folder: Path, language: str | None = None, device: str = "cpu"):
        import transformers
        from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        local = {"local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(folder, **local)
            generates = type(config) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
            kind = (
                transformers.AutoModelForSpeechSeq2Seq
                if generates
                else transformers.AutoModelForCTC
            )
            model, report = kind.from_pretrained(folder, output_loading_info=True, **local)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            extractor = AutoFeatureExtractor.from_pretrained(folder, **local)
        except Exception as error:  # transformers, tokenizers and safetensors have their own each
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise CmktError(
                f"transformers cannot load the recogniser: {reason}",
                folder,
                remedy="needs a CTC or speech-to-text model, its tokenizer and feature extractor",
            ) from error
        # Such parameters would be random.
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise CmktError(
                f"not a trained recogniser: the weights lack {len(missing)} parameters, "
                f"for example {missing[0]}",
                folder,
                remedy="take one that was fine-tuned for recognition",
            )
        self.fs = extractor.sampling_rate
        self.options = {}
        self.long_options = {} if generates else {"chunk_length_s": LONGEST}
        if config.model_type == "whisper":
            self.long_options = {"return_timestamps": True}
            self.options = self._whisper_options(model.generation_config, language, folder)
        self.pipeline = transformers.pipeline(
            "automatic-speech-recognition",
            model=model.eval(),
            tokenizer=tokenizer,
            feature_extractor=extractor,
            device=device,
        )

    @staticmethod
    def _whisper_options(config, language: str | None, folder: Path) -> dict:
        languages = getattr(config, "lang_to_id", None)
        if language is not None and f"<|{language}|>" not in (languages or {}):
            known = ", ".join(token.strip("<|>") for token in languages or ["en, fixed"])
            raise CmktError(
                f"--language {language}: the model does not have it",
                folder,
                remedy=f"it has {known}",
            )
        if not languages:
            return {}
        return {"generate_kwargs": {"task": "transcribe", "language": language}}

    def __call__(self, audio: np.ndarray) -> str:
        """Return the text of audio (N,) of any length."""
        import torch

        torch.manual_seed(0)  # long-form Whisper may sample after a failed attempt
        options = {**self.options, **(self.long_options if len(audio) > LONGEST * self.fs else {})}
        return self.pipeline({"raw": audio, "sampling_rate": self.fs}, **options)["text"]
