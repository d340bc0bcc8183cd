"""Parts of a data directory, and splits that keep what belongs together on one side."""

import hashlib
from collections.abc import Iterable

from cmkt.corpus.datadir import DataDirectory
from cmkt.errors import CmktError


def select(data: DataDirectory, utterances: Iterable[str]) -> DataDirectory:
    """Return the part of a data directory that holds these utterances."""
    wanted = set(utterances)

    def part(table: dict) -> dict:
        return {key: value for key, value in table.items() if key in wanted}

    return DataDirectory(
        part(data.wav),
        part(data.utt2spk),
        None if data.spk1 is None else part(data.spk1),
        part(data.text),
        {name: part(table) for name, table in data.extra.items()},
    )


def split_groups(group_of: dict[str, str], shares: dict[str, float]) -> dict[str, set[str]]:
    """Split items so that all of one group lie on one side.

    The groups are ordered by a hash of their names, the same on every machine, and dealt out in
    this order; each side gets its share of the groups, and at least one.

    Args:
        group_of: group of each item: the speaker of an utterance, the recording of a noise file.
        shares: share of the groups of each side but one, which comes last with a share of 1 and
            takes the rest: `{"test": 0.1, "valid": 0.1, "train": 1}`.

    Returns:
        {side: its items}.

    Raises:
        CmktError: fewer groups than sides.
    """
    groups = sorted(set(group_of.values()), key=lambda g: hashlib.sha256(g.encode()).digest())
    if len(groups) < len(shares):
        raise CmktError(f"{len(groups)} groups cannot be split into {', '.join(shares)}")
    side_of: dict[str, str] = {}
    total = len(groups)
    for side, share in shares.items():
        count = len(groups) if share == 1 else max(round(share * total), 1)
        side_of.update(dict.fromkeys(groups[:count], side))
        groups = groups[count:]
    return {
        side: {item for item, group in group_of.items() if side_of[group] == side}
        for side in shares
    }
