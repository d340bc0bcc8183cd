"""Masks, lengths and positions of padded sequences."""

import torch
from torch.nn import functional as F


def lengths_to_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Return (B, size), true where a position is valid."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


def relative_positions(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Return (B, size): the middle of position t as a share of the valid length."""
    steps = torch.arange(size, device=lengths.device, dtype=torch.float32) + 0.5
    return steps[None] / lengths.clamp(min=1)[:, None]


def order_distance(
    token_lengths: torch.Tensor, tokens: int, frame_lengths: torch.Tensor, frames: int
) -> torch.Tensor:
    """Return (B, T_t, T_a): how far frame j is from token i's place in the time order, squared.

    d_ij = |i/n - j/m| / sqrt(1/n^2 + 1/m^2) with n tokens and m frames (Lu et al. 2409.02239):
    with many more frames than tokens, the unit of d is the length of one token.
    """
    at_token = relative_positions(token_lengths, tokens)[:, :, None]
    at_frame = relative_positions(frame_lengths, frames)[:, None, :]
    scale = token_lengths.clamp(min=1) ** -2.0 + frame_lengths.clamp(min=1) ** -2.0
    return (at_token - at_frame) ** 2 / scale[:, None, None]


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Encode positions in [0, 1] (B, T) as sines and cosines (B, T, width)."""
    half = width // 2
    octaves = torch.arange(half, device=positions.device) / half
    angles = positions[..., None] * 2 * torch.pi * 64.0**octaves
    encoded = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(encoded, (0, width - encoded.shape[-1]))
