"""What a YAML's `criterions` say of the rivals that need no text (docs/rivals.md)."""

from pathlib import Path

from cmkt.errors import CmktError

RIVALS = ("speech_encoder", "mimic")


def _is_rival(criterion: dict) -> bool:
    return criterion.get("name") in RIVALS


def without_rivals(criterions: list[dict]) -> list[dict]:
    """Return the criterions that stock ESPnet knows, for an export."""
    return [criterion for criterion in criterions if not _is_rival(criterion)]


def recognisers(criterions: list[dict]) -> list[Path]:
    """Return the folders of the recognisers that a training depends on."""
    confs = [c.get("conf") or {} for c in criterions if c.get("name") == "mimic"]
    return [Path(conf["recogniser"]) for conf in confs if isinstance(conf.get("recogniser"), str)]


def fill_sample_rate(criterions: list[dict], sample_rate: int) -> list[dict]:
    """Tell the rivals the sampling rate of the data, unless the YAML does.

    Args:
        criterions: as ESPnet has them.
        sample_rate: in Hz.

    Returns:
        a copy.

    Raises:
        CmktError: there are rivals only, so nothing would say which epoch is the best.
    """
    if criterions and not without_rivals(criterions):
        raise CmktError(
            f"criterions: {' and '.join(RIVALS)} accompany an enhancement loss",
            remedy="add one, for example l1_fd",
        )
    return [
        {**c, "conf": {"fs": sample_rate, **(c.get("conf") or {})}} if _is_rival(c) else c
        for c in criterions
    ]
