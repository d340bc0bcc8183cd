"""Tokenizers of the text at hand, for a language model of one's own."""

import io
import re
from collections import Counter

from cmkt.errors import CmktError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
PIECES = 500  # of sentencepiece, unless told otherwise
MOST_POSITIONS = 512  # tokens of a line, [CLS] and [SEP] included


def train_sentencepiece(lines: list[str], vocab_size: int = 0) -> bytes:
    """Train a sentencepiece unigram model with this module's special tokens.

    Args:
        lines: texts.
        vocab_size: most pieces, special tokens included; fewer if the text has not so many; 0
            means 500.

    Returns:
        the model as sentencepiece writes it.

    Raises:
        CmktError: the text has more characters than the vocabulary may have pieces.
    """
    import sentencepiece

    pad, unknown, begin, end, mask = SPECIAL
    model, wanted = io.BytesIO(), vocab_size or PIECES
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="unigram",
            vocab_size=wanted, hard_vocab_limit=False, normalization_rule_name="nfkc",
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols=[mask],
            pad_piece=pad, unk_piece=unknown, bos_piece=begin, eos_piece=end,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        characters = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if characters is None:
            raise
        raise CmktError(
            f"vocab_size: {wanted} pieces are too few for the text's characters",
            remedy=f"want at least {characters[1]}, or vocabulary: character",
        ) from error
    return model.getvalue()


def sentencepiece_tokenizer(lines: list[str], vocab_size: int = 0):
    """Make a fast tokenizer of a sentencepiece model that is trained on the lines.

    Args:
        lines: texts.
        vocab_size: see `train_sentencepiece`.

    Returns:
        a `PreTrainedTokenizerFast` that segments as sentencepiece does.

    Raises:
        CmktError: as `train_sentencepiece`.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = ModelProto.FromString(train_sentencepiece(lines, vocab_size))
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if len(pieces) < (vocab_size or PIECES):
        print(f"the text has {len(pieces)} pieces only, not the {vocab_size or PIECES} wanted")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_special_tokens(tokenizer)


def character_tokenizer(lines: list[str], vocab_size: int = 0):
    """Make a fast tokenizer of which each character but spaces is a token.

    Args:
        lines: texts.
        vocab_size: most tokens, special ones included: the most frequent characters; 0 means all.

    Returns:
        a `PreTrainedTokenizerFast`; a character that is not in the lines is [UNK].
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    counts = Counter(character for line in lines for character in "".join(line.split()))
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    most = vocab_size - len(SPECIAL) if vocab_size else len(frequent)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *frequent[:most]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    return _with_special_tokens(tokenizer)


def _with_special_tokens(tokenizer):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    pad, unknown, begin, end, mask = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(begin, SPECIAL.index(begin)), (end, SPECIAL.index(end))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=begin,
        sep_token=end, mask_token=mask, model_max_length=MOST_POSITIONS,
    )  # fmt: skip
