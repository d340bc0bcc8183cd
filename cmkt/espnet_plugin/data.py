"""The data type `linguistic_ark`: token embeddings, or zeros where there is no transcript."""

from collections.abc import Mapping

import kaldiio
import numpy as np
from espnet2.train.dataset import DATA_TYPES


class OptionalArk(Mapping):
    """An ark of matrices that answers every utterance id.

    Args:
        path: `linguistic.scp` of a store.

    An utterance that the store lacks gives zeros (1, D), which the transfer masks, so utterances
    without a transcript stay in training.
    """

    def __init__(self, path: str):
        self.matrices = kaldiio.load_scp(str(path))
        first = next(iter(self.matrices))
        self.missing = np.zeros((1, self.matrices[first].shape[1]), dtype=np.float32)

    def __getitem__(self, utterance: str) -> np.ndarray:
        return self.matrices[utterance] if utterance in self.matrices else self.missing

    def __len__(self) -> int:
        return len(self.matrices)

    def __iter__(self):
        return iter(self.matrices)


# ESPnet takes the first registered name that is a prefix of the requested one; none is of this.
DATA_TYPES["linguistic_ark"] = dict(
    func=OptionalArk,
    kwargs=[],
    help="Token embeddings (tokens, dimension) of `cmkt embed`; zeros where one is missing.",
)
