"""The cross-modality transformer: one acoustic summary for each text token."""

import torch
from torch import nn
from torch.nn import functional as F

from cmkt.transfer.alignment.base import Aligned, Alignment, Inputs
from cmkt.transfer.sequences import order_distance, relative_positions, sinusoids
from cmkt.transfer.settings import choice, number, truth, whole


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to frames, with a learnable preference for time order.

    The logits of head h get -d^2 / (2 sigma_h^2), the order prior of temporal-order optimal
    transport (see `order_distance`), so that a fresh module looks near the diagonal, two tokens
    wide to either side.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.log_sigma = nn.Parameter(torch.full((heads,), 2.0).log())

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, width / heads)

    def forward(self, tokens, frames, distance, valid, need_weights):
        """Attend; `distance` (B, T_t, T_a) as of `order_distance`, `valid` (B, T_a) frames."""
        q, k = self._split(self.query(tokens)), self._split(self.key(frames))
        v = self._split(self.value(frames))
        mask = -distance[:, None] / (2 * self.log_sigma.exp()[:, None, None] ** 2)
        # Finite, since a row of -inf (no valid frame) would turn into NaN.
        mask = mask.masked_fill(~valid[:, None, None], torch.finfo(mask.dtype).min / 2)
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask
            weights = logits.softmax(-1).mean(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.output(y.transpose(1, 2).flatten(2)), weights


class Layer(nn.Module):
    """Pre-norm cross-attention and feed-forward; `residual` keeps the query in the result."""

    def __init__(self, width: int, heads: int, dropout: float, residual: bool):
        super().__init__()
        self.residual = residual
        self.norm_tokens, self.norm_inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, heads, dropout)
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, tokens, frames, distance, valid, need_weights):
        """Return the tokens (B, T_t, width) after one layer, and the weights if wanted."""
        normed = self.norm_tokens(tokens)
        attended, weights = self.attention(normed, frames, distance, valid, need_weights)
        tokens = tokens + attended if self.residual else attended
        return tokens + self.inner(self.norm_inner(tokens)), weights


class CrossModalityTransformer(Alignment):
    """Make zhat, one vector in the text space for each token, from the acoustic sequence.

    Args:
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        width: width inside.
        heads: attention heads; divides `width`.
        layers: number of layers.
        dropout: dropout rate.
        query: `position`: queries know t and T_t only and cannot leak the text (as in Deng et al.
            2203.03582). `text`: queries are the token embeddings; the cosine then rises without
            any transfer (docs/method.md), kept for study.
        residual: add the query to what it attends to. With text queries this hands z straight
            to zhat.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(
        self,
        acoustic_dim: int,
        linguistic_dim: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 1,
        dropout: float = 0.0,
        query: str = "position",
        residual: bool = True,
    ):
        super().__init__()
        for name, value in (("width", width), ("heads", heads), ("layers", layers)):
            whole(f"alignment.{name}", value, 1)
        if width % heads:
            raise ValueError(f"alignment.heads {heads} does not divide alignment.width {width}")
        number("alignment.dropout", dropout, 0, 0.99)
        choice("alignment.query", query, ("position", "text"))
        truth("alignment.residual", residual)
        self.width, self.query = width, query
        self.uses_text = query == "text"
        self.from_acoustic = nn.Sequential(
            nn.LayerNorm(acoustic_dim), nn.Linear(acoustic_dim, width)
        )
        if query == "text":
            self.from_text = nn.Linear(linguistic_dim, width)
        self.layers = nn.ModuleList(
            Layer(width, heads, float(dropout), residual) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.to_text = nn.Linear(width, linguistic_dim)

    def align(self, inputs: Inputs, need_weights: bool) -> Aligned:
        """Align; `weights` is the last layer's attention, the mean over its heads."""
        sizes = inputs.text.shape[1], inputs.acoustic.shape[1]
        distance = order_distance(inputs.token_lengths, sizes[0], inputs.frame_lengths, sizes[1])
        at_frame = relative_positions(inputs.frame_lengths, sizes[1])
        frames = self.from_acoustic(inputs.acoustic) + sinusoids(at_frame, self.width)
        tokens = sinusoids(relative_positions(inputs.token_lengths, sizes[0]), self.width)
        if self.query == "text":
            tokens = tokens + self.from_text(inputs.text)
        weights = None
        for layer in self.layers:
            last = layer is self.layers[-1]
            tokens, weights = layer(tokens, frames, distance, inputs.frames, need_weights and last)
        return Aligned(self.to_text(self.norm(tokens)), weights)
