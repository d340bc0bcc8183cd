"""The core of CMKT, usable from any toolkit: needs torch only."""

from cmkt.transfer.alignment import CrossModalityTransformer
from cmkt.transfer.loss import cosine_alignment_loss
from cmkt.transfer.misalignment import Misalignment
from cmkt.transfer.objective import CrossModalTransfer

__all__ = [
    "CrossModalTransfer",
    "CrossModalityTransformer",
    "Misalignment",
    "cosine_alignment_loss",
]
