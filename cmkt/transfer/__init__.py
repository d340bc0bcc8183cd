"""The core of CMKT, usable from any toolkit: needs torch only."""

from cmkt.transfer.alignment import ALIGNMENTS, build_alignment
from cmkt.transfer.alignment.transformer import CrossModalityTransformer
from cmkt.transfer.feedback import FeedbackAdapter
from cmkt.transfer.losses import TransferLoss
from cmkt.transfer.misalignment import Misalignment
from cmkt.transfer.objective import CrossModalTransfer
from cmkt.transfer.targets import Targets

__all__ = [
    "ALIGNMENTS",
    "CrossModalTransfer",
    "CrossModalityTransformer",
    "FeedbackAdapter",
    "Misalignment",
    "Targets",
    "TransferLoss",
    "build_alignment",
]
