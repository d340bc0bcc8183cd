"""Checks of the settings of `transfer_conf`, and the building of its parts."""

import difflib
import inspect
from collections.abc import Iterable


def whole(name: str, value, least: int) -> int:
    """Return a whole number of at least `least`.

    Raises:
        ValueError: it is none; the message has the name.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


def number(name: str, value, low: float, high: float = float("inf"), above: bool = False) -> float:
    """Return a number from `low` to `high`; with `above`, `low` itself is refused.

    Raises:
        ValueError: it is none; the message has the name.
    """
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (above and value == low):
        lower = f"above {low:g}" if above else f"at least {low:g}"
        limits = lower if high == float("inf") else f"{lower} and at most {high:g}"
        raise ValueError(f"{name} must be a number of {limits}, not {value!r}")
    return float(value)


def truth(name: str, value) -> bool:
    """Return true or false.

    Raises:
        ValueError: it is neither; the message has the name.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")
    return value


def choice(name: str, value, known: Iterable[str]) -> str:
    """Return one of the known words.

    Raises:
        ValueError: it is none of them; the message has the name, the words and the nearest one.
    """
    known = list(known)
    if value not in known:
        listed = ", ".join(known)
        raise ValueError(f"{name} must be one of {listed}, not {value!r}{_near(value, known)}")
    return value


def build_part(kind: type, name: str, conf: dict | None, *positional):
    """Build `kind(*positional, **conf)`.

    Args:
        kind: a class.
        name: of the part in the YAML, for messages.
        conf: its settings.
        *positional: arguments that are not settings.

    Raises:
        ValueError: `conf` is no mapping, or has a key that the class does not take (the nearest
            one is named).
    """
    conf = {} if conf is None else conf
    if not isinstance(conf, dict):
        raise ValueError(f"{name} must be a mapping, not {conf!r}")
    known = list(inspect.signature(kind).parameters)[len(positional) :]
    for key in conf:
        if key not in known:
            raise ValueError(f"{name}: {unknown_key(key, known)}")
    return kind(*positional, **conf)


def unknown_key(key, known: Iterable[str]) -> str:
    """Return a message about a key that is not among the known ones; it names the nearest."""
    known = list(known)
    return f"unknown key {key} (known: {', '.join(known)}){_near(key, known)}"


def _near(word, known: list[str]) -> str:
    near = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {near[0]}?" if near else ""
