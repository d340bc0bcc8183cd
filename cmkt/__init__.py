"""Cross-Modality Knowledge Transfer (CMKT) for speech enhancement."""

__version__ = "0.1.0"
