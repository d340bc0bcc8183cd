"""What the separators of this package ask of their input."""

from espnet2.enh.layers.complex_utils import is_complex

from cmkt.errors import CmktError


def require_spectrum(separator: str, value) -> None:
    """Refuse what is no spectrum of one channel.

    Args:
        separator: its name in the YAML.
        value: wanted is (B, T, F) complex, of torch or of torch_complex.

    Raises:
        CmktError: it is real, or of several channels.
    """
    if not is_complex(value) or value.dim() != 3:
        raise CmktError(
            f"separator {separator} needs a complex spectrum of one channel",
            remedy="set encoder: stft and decoder: stft",
        )
