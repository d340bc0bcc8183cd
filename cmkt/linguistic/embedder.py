"""A frozen Hugging Face language model that turns texts into embeddings of their tokens."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from cmkt.errors import CmktError
from cmkt.linguistic.config import LanguageModelConfig
from cmkt.linguistic.models import LocalModel, load_model, load_tokenizer, positions_of
from cmkt.linguistic.units import mean_of_members, pieces_of_units, unit_spans

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
        self.config, self.folder = config, model.folder
        self.tokenizer = load_tokenizer(model.folder)
        if not self.tokenizer.is_fast and (config.unit != "token" or config.prompt):
            raise CmktError(
                f"{type(self.tokenizer).__name__} does not say where in the text a token lies, "
                "which words, characters and prompts need",
                model.folder,
                remedy="take unit: token without a prompt, or a model with a fast tokenizer",
            )
        self.model, self.layers = load_model(model.folder, config, device)
        self.lookup = self.model.get_input_embeddings()
        # Weights that wait on the CPU or the disk are fetched by hooks of accelerate.
        placed = self.lookup.weight.device
        self.device = placed if placed.type != "meta" else "cpu"
        self.positions = positions_of(self.model, self.tokenizer)
        # Padding is masked, so for decoders, which often have no pad token, any id serves.
        pad = self.tokenizer.pad_token_id or 0
        self.pad = pad if pad < len(self.lookup.weight) else 0
        self.batch_tokens = config.batch_tokens
        self._string = cache(self._name_token)
        self.dimension = next(self._run([[0]])).shape[-1]

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
            if len({states.shape[-1] for states in chosen}) > 1:
                raise CmktError(
                    f"layer {self.config.layer}: the layers differ in width",
                    self.folder,
                    remedy="take a single layer",
                )
            # The layers of a `device_map` may lie on several devices.
            total = chosen[0].float()
            for states in chosen[1:]:
                total = total + states.float().to(total.device)
            return (total / len(chosen)).cpu().numpy()
