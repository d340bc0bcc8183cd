"""Parts of a data directory, and splits that keep what belongs together on one side."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from cmkt.corpus.datadir import DataDirectory
from cmkt.errors import CmktError

HELD_OUT = 0.1  # share of the speakers of each set that is split off


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


def split_off(
    sets: dict[str, DataDirectory], missing: list[str], where: Path
) -> dict[str, DataDirectory]:
    """Take missing sets from the training set, each a tenth of its speakers and at least one.

    With fewer speakers than sets, utterances are split instead; this is said.

    Args:
        sets: {name: data}, of which one is `train`.
        missing: names of the sets to make, such as `["test", "valid"]`.
        where: the corpus, for messages.

    Returns:
        all sets, `train` first.

    Raises:
        CmktError: fewer utterances than sets.
    """
    data = sets["train"]
    shares = {**dict.fromkeys(missing, HELD_OUT), "train": 1}
    group_of, speakers = data.utt2spk, len(set(data.utt2spk.values()))
    if len(data.wav) < len(shares):
        raise CmktError(
            f"{len(data.wav)} utterances cannot be split into {', '.join(shares)}",
            where,
            remedy="give more speech",
        )
    if speakers < len(shares):
        group_of = {utterance: utterance for utterance in data.wav}
        print(
            f"{where}: too few speakers to keep the sets apart ({speakers}): split by utterance. "
            "The check of the data will name it; run.sh --validate_args '--allow shared_speakers'"
        )
    parts = split_groups(group_of, shares)
    made = {name: select(data, parts[name]) for name in ("train", *missing)}
    return {**made, **{name: data for name, data in sets.items() if name != "train"}}
