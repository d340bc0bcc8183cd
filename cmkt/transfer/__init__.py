"""The core of CMKT, usable from any toolkit: needs torch only."""

from cmkt.transfer.alignment import CrossModalityTransformer
from cmkt.transfer.loss import cosine_alignment_loss
from cmkt.transfer.misalignment import Misalignment
from cmkt.transfer.objective import CrossModalTransfer
from cmkt.transfer.targets import Targets

__all__ = [
    "CrossModalTransfer",
    "CrossModalityTransformer",
    "Misalignment",
    "Targets",
    "cosine_alignment_loss",
]
