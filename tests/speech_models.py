"""Tiny speech encoders and recognisers with random weights, made by the real libraries."""

from pathlib import Path

import torch
import yaml

from cmkt.espnet_plugin.ctc import WEIGHTS, CtcRecogniser
from cmkt.stage import Stage

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 16, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2}  # fmt: skip
# The real strides (320 samples a frame), narrow.
CONVOLUTIONS = {"conv_dim": [8] * 7}
KINDS = {  # class, whether its audio is scaled, and what else is special about it
    "WavLM": ("WavLM", False, {"feat_extract_norm": "group"}),
    "HuBERT": ("Hubert", True, {"feat_extract_norm": "group"}),
    "HuBERT large": ("Hubert", True, {"feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "wav2vec2": ("Wav2Vec2", True, {"feat_extract_norm": "group"}),
    "Whisper": ("Whisper", False, {}),
}


def make_encoder(kind: str, folder: Path) -> Path:
    """Save an encoder of `KINDS` with its feature extractor."""
    import transformers

    name, scaled, special = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "Whisper":
            config = transformers.WhisperConfig(
                num_mel_bins=8, d_model=16, encoder_layers=3, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                decoder_ffn_dim=16, vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1, max_source_positions=100)  # fmt: skip
            extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
        else:
            config = getattr(transformers, f"{name}Config")(**SIZES, **CONVOLUTIONS, **special)
            extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=scaled)
        model = getattr(transformers, f"{name}Model")(config)
        for parameter in model.parameters():  # norms and biases that do something
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def make_recogniser(folder: Path, fs: int = 16000) -> Path:
    """Save a random recogniser as `cmkt train-recogniser` does."""
    size = {"width": 16, "blocks": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CtcRecogniser("abc ", fs, **size)
    with Stage(folder, [], {}).working_directory() as work:
        torch.save(model.state_dict(), work / WEIGHTS)
        meta = {"characters": model.characters, "sample_rate": fs, "size": size}
        (work / "meta.yaml").write_text(yaml.safe_dump(meta))
    return folder


def tiny_rivals(criterions: list[dict], folder: Path) -> list[dict]:
    """Return the criterions of a YAML with tiny models in place of those that it names."""
    changes = {
        "speech_encoder": lambda: {"model": str(make_encoder("WavLM", folder / "w")), "layer": 2},
        "mimic": lambda: {"recogniser": str(make_recogniser(folder / "r"))},
    }
    return [
        {**c, "conf": {**c["conf"], **changes[c["name"]]()}} if c["name"] in changes else c
        for c in criterions
    ]
