"""What a language-model YAML (conf/llm/*.yaml) may say."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from cmkt.errors import CmktError
from cmkt.linguistic.normalise import check_normaliser

CHOICES = {
    "unit": ("token", "word", "character"),
    "dtype": ("float32", "bfloat16", "float16"),
    "quantization": (None, "8bit", "4bit"),
    "too_long": ("split", "truncate"),
    "storage": ("float32", "16bit", "8bit"),
}


@dataclass
class LanguageModelConfig:
    """A language model and how its features are made.

    Args:
        model: a local folder, a Hugging Face name or `package:<module>`.
        revision: branch, tag or commit on the hub.
        sha256: of the weights; others are refused.
        layer: index of the hidden layer (0: the first layer's input; -1: the last one), `a:b` for
            the mean of the layers a to b, both included, or `input` for the static embeddings.
        unit: `token`; `word` (mean of a word's pieces); `character`.
        prompt: a template with `{text}`; only the text's own tokens are kept.
        dtype: of the model's weights.
        device_map: of `from_pretrained` (needs accelerate), for models larger than one device.
        quantization: `8bit` or `4bit`, where bitsandbytes is installed.
        normaliser: see `cmkt.linguistic.normalise`.
        normaliser_conf: its options.
        too_long: a text longer than the model takes is split into pieces, or truncated.
        batch_tokens: tokens at once, padding included.
        storage: `float32`; `16bit` or `8bit`: Kaldi's compressed matrices.
        lm_train: options of `cmkt lm-train`, which makes the model first.
    """

    model: str | None = None
    revision: str | None = None
    sha256: str | None = None
    layer: int | str = -1
    unit: str = "token"
    prompt: str | None = None
    dtype: str = "float32"
    device_map: str | None = None
    quantization: str | None = None
    normaliser: str = "none"
    normaliser_conf: dict = field(default_factory=dict)
    too_long: str = "split"
    batch_tokens: int = 2048
    storage: str = "float32"
    lm_train: dict = field(default_factory=dict)

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            CmktError: what is wrong with which key.
        """
        if self.model is None:
            raise CmktError("no language model", remedy="give --llm_config or --model")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                named = ", ".join(str(choice) for choice in choices)
                raise CmktError(f"{key}: {getattr(self, key)!r} is not one of {named}")
        if isinstance(self.layer, str) and not re.fullmatch(r"input|-?\d+(:-?\d+)?", self.layer):
            raise CmktError(
                f"layer: {self.layer!r} is no layer",
                remedy="want a number, a:b for the mean of a range, or input",
            )
        if self.prompt is not None and self.prompt.count("{text}") != 1:
            raise CmktError("prompt: it must hold {text} once")
        if self.batch_tokens < 1:
            raise CmktError(f"batch_tokens: {self.batch_tokens}, want at least 1")
        check_normaliser(self.normaliser, self.normaliser_conf)

    def features(self) -> dict:
        """Return what the features depend on besides the model's files."""
        keys = ("layer", "unit", "prompt", "dtype", "quantization", "normaliser", "normaliser_conf",
                "too_long", "storage")  # fmt: skip
        return {key: getattr(self, key) for key in keys}


KINDS = {
    field.name: tuple(kind for kind in (int, str, dict) if kind.__name__ in str(field.type))
    or (field.type,)
    for field in fields(LanguageModelConfig)
}
NAMES = {int: "a whole number", str: "text, in quotes if it looks like a number", dict: "a mapping"}


def read_config(path: str | Path) -> LanguageModelConfig:
    """Read a language-model YAML.

    Args:
        path: for example `conf/llm/minilm.yaml`.

    Raises:
        CmktError: not YAML, an unknown key or a wrong type; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise CmktError("no such language-model configuration", path, remedy="see conf/llm/")
    try:
        source = path.read_text(encoding="utf-8")
        root, values = yaml.compose(source), yaml.safe_load(source)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise CmktError("not YAML", path, mark.line + 1 if mark else None) from error
    known = f"known keys: {', '.join(KINDS)}"
    if not isinstance(values, dict):
        raise CmktError("not a YAML mapping", path, remedy=known)
    lines = {}
    for node, _ in root.value:
        key = node.value
        lines[key] = node.start_mark.line + 1
        if key not in KINDS:
            raise CmktError(f"unknown key {key}", path, lines[key], known)
        optional = values[key] is None and getattr(LanguageModelConfig, key, 0) is None
        # `type`, because True is an int and a bare number no name.
        if not optional and type(values[key]) not in KINDS[key]:
            wanted = " or ".join(NAMES[kind] for kind in KINDS[key])
            raise CmktError(f"{key}: {values[key]!r} is not {wanted}", path, lines[key])
    config = LanguageModelConfig(**values)
    try:
        config.check()
    except CmktError as error:
        raise CmktError(str(error), path, lines.get(str(error).partition(":")[0])) from error
    return config
