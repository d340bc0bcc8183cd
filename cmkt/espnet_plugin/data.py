"""The data type `linguistic_ark`: token embeddings, or zeros where there is no transcript."""

from collections.abc import Mapping

import numpy as np
from espnet2.train.dataset import DATA_TYPES

from cmkt.corpus.datadir import read_table
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
        return read_matrix(self.places[utterance], utterance)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self):
        return iter(self.places)


# ESPnet takes the first registered name that is a prefix of the requested one; none is of this.
DATA_TYPES["linguistic_ark"] = dict(
    func=OptionalArk,
    kwargs=[],
    help="Token embeddings (tokens, dimension) of `cmkt embed`; zeros where one is missing.",
)
