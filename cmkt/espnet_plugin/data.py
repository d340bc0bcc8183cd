"""The data type `linguistic_ark`: token embeddings, or zeros where there is no transcript."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from espnet2.train.dataset import DATA_TYPES

from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.linguistic.store import read_matrix


class OptionalArk(Mapping):
    """An ark of matrices that answers every utterance id.

    Args:
        path: `linguistic.scp` of a store.

    An utterance that the store lacks gives zeros (1, D), which the transfer masks, so utterances
    without a transcript stay in training.
    """

    def __init__(self, path: str):
        self.places = read_table(path)
        first = next(iter(self.places))
        self.missing = np.zeros((1, self[first].shape[1]), dtype=np.float32)

    def __getitem__(self, utterance: str) -> np.ndarray:
        if utterance not in self.places:
            return self.missing
        matrix = read_matrix(self.places[utterance], utterance)
        if not np.isfinite(matrix).all():
            raise CmktError(
                f"NaN or infinity in the embeddings of utterance {utterance}",
                self.places[utterance].rpartition(":")[0],
                remedy="remove the store and run stage 3 again, in another dtype",
            )
        return matrix

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self):
        return iter(self.places)


def read_candidates(scp: str | Path, token_ids: str | Path | None, utterances: int = 100):
    """Read the tokens among which a training's diagnostics look for each.

    Args:
        scp: `linguistic.scp` of the validation set.
        token_ids: its token ids, as `write_token_ids` writes them; None for none.
        utterances: how many to take, from the first on.

    Returns:
        token embeddings (N, D_t), float32, and their ids (N,) or None.
    """
    store = OptionalArk(str(scp))
    chosen = list(store)[:utterances]
    text = torch.from_numpy(np.concatenate([store[utterance] for utterance in chosen]))
    if token_ids is None:
        return text, None
    table = read_table(token_ids)
    ids = [int(number) for utterance in chosen for number in table[utterance].split()]
    return text, torch.tensor(ids)


# ESPnet takes the first registered name that is a prefix of the requested one; none is of this.
DATA_TYPES["linguistic_ark"] = dict(
    func=OptionalArk,
    kwargs=[],
    help="Token embeddings (tokens, dimension) of `cmkt embed`; zeros where one is missing.",
)
