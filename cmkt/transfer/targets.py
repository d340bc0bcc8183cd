"""What the acoustic side is compared with: token embeddings, raw, standardised or reduced."""

import torch
from torch import nn


class Targets(nn.Module):
    """An affine map of token embeddings, from the statistics of the training set.

    Embeddings of BERT-like models share a large common vector and have a few dimensions of much
    larger variance, so that raw ones of any two tokens have a high cosine. Standardised ones do
    not.

    Args:
        linguistic_dim: D_t, width of the token embeddings.
        standardise: give each dimension mean 0 and variance 1.
        pca: keep this many principal components (of the standardised dimensions if
            `standardise`); None keeps all dimensions.

    Raises:
        ValueError: a value of the wrong type or outside its range.

    A fresh module leaves its input as it is (its first `pca` dimensions): call
    `set_statistics`, or load a state.
    """

    def __init__(self, linguistic_dim: int, standardise: bool = False, pca: int | None = None):
        super().__init__()
        if not isinstance(standardise, bool):
            raise ValueError(f"standardise must be true or false, not {standardise!r}")
        whole = isinstance(pca, int) and not isinstance(pca, bool)
        if pca is not None and not (whole and 1 <= pca <= linguistic_dim):
            raise ValueError(f"pca must be a whole number from 1 to {linguistic_dim}, not {pca!r}")
        self.standardise, self.pca = standardise, pca
        self.dimension = pca or linguistic_dim
        if self.needs_statistics:
            self.register_buffer("mean", torch.zeros(linguistic_dim))
            self.register_buffer("scale", torch.ones(linguistic_dim))
        if pca:
            self.register_buffer("components", torch.eye(linguistic_dim)[:, :pca].clone())

    @property
    def needs_statistics(self) -> bool:
        """Whether `set_statistics` must be called."""
        return self.standardise or self.pca is not None

    @torch.no_grad()
    def set_statistics(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        """Set the map.

        Args:
            mean: (D_t,) of the token embeddings of the training set.
            covariance: (D_t, D_t).
        """
        self.mean.copy_(mean)
        covariance = covariance.double()
        if self.standardise:
            variance = covariance.diagonal()
            # A dimension that never changes tells nothing: it becomes 0.
            known = variance > 1e-10 * variance.max()
            scale = torch.where(known, variance.clamp(min=1e-30).rsqrt(), 0.0)
            self.scale.copy_(scale)
            covariance = scale[:, None] * covariance * scale
        if self.pca:
            _, vectors = torch.linalg.eigh(covariance)  # eigenvalues ascend
            self.components.copy_(vectors.flip(-1)[:, : self.pca])

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Map token embeddings (B, T_t, D_t) to targets (B, T_t, dimension), float32."""
        if not self.needs_statistics:
            return text
        with torch.autocast(text.device.type, enabled=False):
            text = (text.float() - self.mean) * self.scale
            return text @ self.components if self.pca else text
