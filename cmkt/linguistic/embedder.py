"""A frozen Hugging Face language model that turns texts into embeddings of their tokens."""

import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cmkt.errors import CmktError
from cmkt.linguistic.config import LanguageModelConfig
from cmkt.linguistic.models import LocalModel
from cmkt.linguistic.units import mean_of_members, pieces_of_units, unit_spans

# Tokens at once for a model that states no limit; T5 was trained on as many.
RELATIVE_POSITIONS = 512
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SPACES = f"{SPACE}ĠĊ"  # how vocabularies write white space


@dataclass(frozen=True)
class Prepared:
    """A tokenized text.

    Args:
        strings: what each row of the embedding stands for, without white space; none if the text
            has no token.
        windows: what the model is given: token ids, special tokens and prompt included. A text
            longer than the model takes has several.
        lead: number of ids at the beginning of each window that are not the text's.
        tail: the same at the end.
        note: what was done to a text that is too long.
        unknown: the words or characters that the tokenizer does not know.
        members: (M,) token numbers of each unit in turn; None if the tokens are the units.
        starts: (len(strings),) where in `members` each unit begins.
    """

    strings: list[str]
    windows: list[list[int]]
    lead: int
    tail: int
    note: str | None
    unknown: list[str]
    members: np.ndarray | None = None
    starts: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Number of ids in all windows."""
        return sum(map(len, self.windows))


class Embedder:
    """A frozen language model.

    Attributes:
        dimension: D, width of the embeddings.
        tokenizer: the model's own.

    Args:
        model: from `find_model`.
        config: the layer, the unit, the prompt, and how the model is loaded.
        device: a torch device, for example `cuda:0`; the configuration's `device_map` overrides it.

    Raises:
        CmktError: files that transformers cannot load, no such layer, no such device, a library or
            a mapping from tokens to text that the configuration needs and that is not there.
    """

    def __init__(self, model: LocalModel, config: LanguageModelConfig, device: str = "cpu"):
        _check_device(device, config)
        self.config, self.folder = config, model.folder
        self.tokenizer = _load_tokenizer(model.folder)
        if not self.tokenizer.is_fast and (config.unit != "token" or config.prompt):
            raise CmktError(
                f"{type(self.tokenizer).__name__} does not say where in the text a token lies, "
                "which words, characters and prompts need",
                model.folder,
                remedy="take unit: token without a prompt, or a model with a fast tokenizer",
            )
        self.model, self.layers, text_config = _load_model(model.folder, config, device)
        self.lookup = self.model.get_input_embeddings()
        # Weights that wait on the CPU or the disk are fetched by hooks of accelerate.
        placed = self.lookup.weight.device
        self.device = placed if placed.type != "meta" else "cpu"
        self.positions = _positions(self.model, text_config, self.tokenizer)
        # Padding is masked, so for decoders, which often have no pad token, any id serves.
        pad = self.tokenizer.pad_token_id or 0
        self.pad = pad if pad < len(self.lookup.weight) else 0
        self.batch_tokens = config.batch_tokens
        self._string = cache(self._name_token)
        self.dimension = self._states([[0]]).shape[-1]

    def prepare(self, texts: list[str]) -> list[Prepared]:
        """Tokenize texts.

        Args:
            texts: normalised.

        Raises:
            CmktError: the prompt alone is longer than the model takes.
        """
        if not texts:
            return []
        before, after = (self.config.prompt or "{text}").split("{text}")
        encoded = self.tokenizer(
            [f"{before}{text}{after}" for text in texts],
            return_special_tokens_mask=True,
            return_offsets_mapping=self.tokenizer.is_fast,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        nowhere = [None] * len(texts)
        columns = (encoded["input_ids"], encoded["special_tokens_mask"])
        offsets = encoded.get("offset_mapping", nowhere)
        return [
            self._prepare(text, len(before), *row)
            for text, *row in zip(texts, *columns, offsets, strict=True)
        ]

    def _prepare(
        self, text: str, begin: int, ids: list[int], special: list[int], offsets: list | None
    ) -> Prepared:
        if offsets is None:
            own = [i for i, added in enumerate(special) if not added]
        else:
            end = begin + len(text)
            own = [
                i
                for i, (added, (a, b)) in enumerate(zip(special, offsets, strict=True))
                if not added and (self.config.prompt is None or (a < end and b > begin))
            ]
        if not own:
            return Prepared([], [], 0, 0, None, [])
        first, last = own[0], own[-1] + 1
        lead, kept, tail = ids[:first], ids[first:last], ids[last:]
        room = self.positions - len(lead) - len(tail)
        if room < 1:
            raise CmktError(
                f"prompt: its {len(lead) + len(tail)} tokens leave no room for a text, "
                f"the model takes {self.positions}",
                self.folder,
            )
        note = None
        if len(kept) > room and self.config.too_long == "truncate":
            note = f"truncated from {len(kept)} to {room} tokens"
            kept = kept[:room]
        count = -(-len(kept) // room)
        if count > 1:
            note = f"split into {count} pieces of at most {self.positions} tokens"
        # Equal pieces, so that none is left with little context.
        cuts = [len(kept) * i // count for i in range(count + 1)]
        chunks = [kept[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        common = ([lead + chunk + tail for chunk in chunks], len(lead), len(tail), note)
        if offsets is None:
            spans = None
        else:
            spans = np.array(offsets[first : first + len(kept)]) - begin  # (P, 2)
        unknown = self._unknown(text, kept, spans)
        if self.config.unit == "token":
            return Prepared([self._string(token) for token in kept], *common, unknown)
        units = np.array(unit_spans(text, self.config.unit)).reshape(-1, 2)
        numbers = np.array(self._with_characters(text, kept, spans), dtype=int)
        members, starts, owners = pieces_of_units(spans[numbers], units)
        strings = [text[a:b] for a, b in units[owners].tolist()]
        if not strings:
            return Prepared([], [], 0, 0, None, unknown)
        return Prepared(strings, *common, unknown, numbers[members], starts)

    def _unknown(self, text: str, ids: list[int], spans: np.ndarray | None) -> list[str]:
        token = self.tokenizer.unk_token_id
        if token is None or token not in ids:
            return []
        places = [i for i, other in enumerate(ids) if other == token]
        if spans is None:
            return [self.tokenizer.unk_token] * len(places)
        return ["".join(text[max(a, 0) : b].split()) for a, b in spans[places].tolist()]

    def _with_characters(self, text: str, ids: list[int], spans: np.ndarray) -> list[int]:
        """Return the numbers of the tokens that are more than the space before a word."""
        strings = map(self._string, ids)
        return [
            number
            for number, (string, (a, b)) in enumerate(zip(strings, spans.tolist(), strict=True))
            if string.strip(SPACES) or string == text[a:b]
        ]

    def _name_token(self, token: int) -> str:
        # Some vocabularies hold tokens of spaces; a list of tokens is split at them.
        return re.sub(r"\s", SPACE, self.tokenizer.convert_ids_to_tokens(token))

    def embed(self, batch: list[Prepared]) -> list[np.ndarray]:
        """Return the embeddings of tokenized texts.

        Args:
            batch: texts with at least one unit, run `batch_tokens` at once, fewer when memory
                runs out.

        Returns:
            for each text float32 (units, D); the other texts of the batch change it by rounding
            only.

        Raises:
            CmktError: not even one window fits into the memory.
        """
        states = self._run([window for text in batch for window in text.windows])
        return [self._rows(text, [next(states) for _ in text.windows]) for text in batch]

    def _rows(self, text: Prepared, states: list[np.ndarray]) -> np.ndarray:
        if not states:
            return np.zeros((0, self.dimension), dtype=np.float32)
        vectors = np.concatenate([s[text.lead : len(s) - text.tail] for s in states])  # (P, D)
        if text.members is None:
            return vectors
        return mean_of_members(vectors, text.members, text.starts)

    def _run(self, windows: list[list[int]]) -> Iterator[np.ndarray]:
        """Yield float32 (T, D) of each window; halve the batch when memory runs out."""
        import torch

        while windows:
            count, longest = 1, len(windows[0])
            for window in windows[1:]:
                longest = max(longest, len(window))
                if longest * (count + 1) > self.batch_tokens:
                    break
                count += 1
            states = None
            try:
                states = self._states(windows[:count])  # (B, T, D)
            except RuntimeError as error:
                # The CPU's allocator has no exception of its own.
                out = isinstance(error, torch.OutOfMemoryError) or "can't allocate" in str(error)
                if not out:
                    raise
                if count == 1:
                    raise CmktError(
                        f"no memory for one text of {len(windows[0])} tokens on {self.device}",
                        self.folder,
                        remedy="take dtype: bfloat16, a quantization, or a larger device",
                    ) from error
            # Outside of `except`, where the traceback would keep the batch in memory.
            if states is None:
                longest = max(map(len, windows[:count]))
                self.batch_tokens = longest * max(count // 2, 1)
                logging.warning(
                    "out of memory on %s: batch_tokens is now %d", self.device, self.batch_tokens
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            for window, rows in zip(windows[:count], states, strict=True):
                yield rows[: len(window)]
            windows = windows[count:]

    def _states(self, windows: list[list[int]]) -> np.ndarray:
        """Run the model on padded windows; return the wanted layer as float32 (B, T, D)."""
        import torch

        longest = max(map(len, windows))
        ids = torch.full((len(windows), longest), self.pad)  # (B, T)
        mask = torch.zeros_like(ids)  # (B, T)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.inference_mode():
            if self.layers is None:
                return self.lookup(ids).float().cpu().numpy()
            output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            first, last = self.layers
            chosen = output.hidden_states[first : last + 1]
            # The layers of a `device_map` may lie on several devices.
            total = chosen[0].float()
            for states in chosen[1:]:
                total = total + states.float().to(total.device)
            return (total / len(chosen)).cpu().numpy()


def _check_device(device: str, config: LanguageModelConfig) -> None:
    import torch

    wanted = {"accelerate": config.device_map or config.quantization,
              "bitsandbytes": config.quantization}  # fmt: skip
    for module, needed in wanted.items():
        if needed and importlib.util.find_spec(module) is None:
            key = "quantization" if config.quantization else "device_map"
            raise CmktError(f"{key}: {module} is not installed", remedy=f"pip install {module}")
    try:
        torch.zeros(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CmktError(f"device {device}: {reason}", remedy="try --device cpu") from error


def _cannot_load(what: str, folder: Path, error: Exception) -> CmktError:
    # transformers, tokenizers and safetensors have exceptions of their own each.
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return CmktError(
        f"transformers cannot load the {what}: {reason}",
        folder,
        remedy="needs config.json, a tokenizer and weights of an AutoModel class",
    )


def _load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _cannot_load("tokenizer", folder, error) from error
    # Without its files transformers makes an empty tokenizer up.
    files = set(tokenizer.vocab_files_names.values())
    if files and not any((folder / name).is_file() for name in files | {"tokenizer.json"}):
        raise CmktError(
            f"no tokenizer: none of {', '.join(sorted(files))} is there",
            folder,
            remedy="copy the whole folder of the model",
        )
    return tokenizer


def _load_model(folder: Path, config: LanguageModelConfig, device: str):
    """Return the model (of an encoder-decoder its encoder), its layers to average, its settings."""
    import torch
    from transformers import AutoConfig, AutoModel, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype)
    options = {"dtype": dtype}
    if config.device_map or config.quantization:
        options["device_map"] = config.device_map or {"": device}
    if config.quantization:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=config.quantization == "8bit",
            load_in_4bit=config.quantization == "4bit",
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        text_config = settings.get_text_config()
        layers = _layers(config.layer, text_config.num_hidden_layers, folder)
        model, report = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except CmktError:
        raise
    except Exception as error:
        raise _cannot_load("language model", folder, error) from error
    # Poolers are not part of the hidden states; anything else missing would be random.
    unused = ("pooler", "decoder.") if settings.is_encoder_decoder else ("pooler",)
    missing = sorted(key for key in report["missing_keys"] if not any(u in key for u in unused))
    if missing:
        raise CmktError(
            f"the weights lack {len(missing)} parameters, for example {missing[0]}",
            folder,
            remedy="get the complete model",
        )
    if settings.is_encoder_decoder:
        model = model.get_encoder()
    if "device_map" not in options:
        model = model.to(device)
    return model.eval().requires_grad_(False), layers, text_config


def _layers(layer: int | str, number: int, folder: Path) -> tuple[int, int] | None:
    """Return the first and the last of the hidden states to average; None: the static ones."""
    if layer == "input":
        return None
    ends = [int(end) for end in str(layer).split(":")]
    # 0 is the first layer's input, so there is one more than there are layers.
    first, last = (end + number + 1 if end < 0 else end for end in (ends[0], ends[-1]))
    if not 0 <= first <= last <= number:
        raise CmktError(
            f"layer {layer}: the model has {number} layers",
            folder,
            remedy=f"want {-number - 1} to {number}, or first:last of them; "
            "0 is the first layer's input",
        )
    return first, last


def _positions(model, text_config, tokenizer) -> int:
    """Return how many tokens the model takes at once."""
    limits = [getattr(text_config, "max_position_embeddings", None) or 0]
    for name, module in model.named_modules():
        # Those of the RoBERTa kind count from behind the padding token.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            limits.append(module.num_embeddings - padding - 1)
    limits = [limit for limit in limits if limit > 0] or [RELATIVE_POSITIONS]
    # A tokenizer without a limit states one of 1e30.
    return int(min(*limits, tokenizer.model_max_length))
