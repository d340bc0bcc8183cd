"""Characters of transcripts: one form for each, and which of them are spoken."""

import re
import unicodedata

# Ideographs with 々 and 〇, for use in a character class.
HAN = "\u2e80-\u2fff\u3005\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LETTER = rf"[^\W_{HAN}]"  # or digit; Han takes no apostrophe

# What stays whole when punctuation goes but numbers stay: 10:30, $5.50, 3.5%, 2026-11-24.
WRITTEN_NUMBER = re.compile(rf"((?:(?<!{LETTER})-)?[$£€¥₹]?\d(?:[.,:/-]?\d)*%?)")
ACRONYM = re.compile(rf"(?<![\w.])(?:(?!\d){LETTER}\.)+(?!\d){LETTER}(?!{LETTER})\.?")
APOSTROPHE = re.compile(
    rf"(?<={LETTER})'(?={LETTER})"  # don't
    rf"|(?<!{LETTER})'(?:n'(?!{LETTER})"
    rf"|(?:bout|cause|em|neath|round|til|tis|twas|twere|twill)(?!{LETTER}))"
    rf"|(?P<possessive>(?<=s)'(?!{LETTER}))"  # the boys' house; in a quotation, its end
    rf"|(?P<opening>'(?={LETTER}))"
    r"|(?P<other>')",
    re.IGNORECASE,
)


class _Characters(dict):
    """What `str.translate` makes of a character, found from its category when first met."""

    def __init__(self, punctuation: str):
        super().__init__({ord(mark): "'" for mark in "'’‘‛ʼ′`"} | {ord("⁄"): "/"})
        self.punctuation = punctuation

    def __missing__(self, code: int) -> int | str | None:
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Cf", "Me") or 0xFE00 <= code <= 0xFE0F:
            self[code] = None  # zero width: joiners, variation selectors, soft hyphens
        elif category == "Nd":
            self[code] = str(unicodedata.decimal(character))
        elif category[0] in "CZ" or (category[0] in "PS" and self.punctuation == "drop"):
            self[code] = " "
        else:
            self[code] = code
        return self[code]


UNIFIED, SPOKEN = _Characters("keep"), _Characters("drop")


def unify(text: str) -> str:
    """Give each character one form: half width, composed, straight apostrophes, ASCII digits."""
    # Compatibility forms would turn the acute into a space, 2½ into 21/2 and 10² into 102.
    text = re.sub(r"(?<=\d)(?=[²³¹¼-¾⅐-⅞])", " ", text.replace("´", "'"))
    text = unicodedata.normalize("NFKC", text).translate(UNIFIED)
    return unicodedata.normalize("NFKC", text)


def drop_punctuation(text: str, numbers: str) -> str:
    """Replace punctuation, symbols and emoji by spaces; a word's own apostrophes stay.

    Args:
        text: a unified text.
        numbers: `keep` leaves the marks inside written numbers (3.5%) as well.
    """
    text = ACRONYM.sub(lambda match: match[0].replace(".", ""), text)
    if "'" in text:
        quoted = any(match["opening"] for match in APOSTROPHE.finditer(text))

        def judge(match: re.Match) -> str:
            quote = match["opening"] or match["other"] or (quoted and match["possessive"])
            return " " if quote else match[0]

        text = APOSTROPHE.sub(judge, text)
    if numbers != "keep":
        return text.translate(SPOKEN)
    parts = WRITTEN_NUMBER.split(text)
    parts[::2] = [part.translate(SPOKEN) for part in parts[::2]]
    return "".join(parts)


def tidy(text: str) -> str:
    """Leave single spaces, and letters composed with the marks that now follow them."""
    return " ".join(unicodedata.normalize("NFC", text).split())
