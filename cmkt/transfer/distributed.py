"""Sums over the processes of a distributed training; without one, what is given comes back."""

import torch


def is_distributed() -> bool:
    """Tell whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def total(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of `values` over all processes; every one of them must call this."""
    if not is_distributed():
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values


def total_norm(norm: torch.Tensor) -> torch.Tensor:
    """Return the norm of a tensor whose parts, of norm `norm`, lie on the processes."""
    return total(norm.square()).sqrt() if is_distributed() else norm


def mean_divisor(chosen: torch.Tensor) -> torch.Tensor:
    """Return what a sum over the chosen utterances of this process is divided by.

    With b utterances here, B on all processes and C of these chosen, this is C b / B. A training
    that weights the losses of the processes by b / B, as ESPnet does, then arrives at the sum over
    all processes divided by C, the mean that a single process would have computed.

    Args:
        chosen: (b,), true for the utterances that take part.

    Returns:
        a scalar above 0; without several processes the number of chosen utterances, at least 1.
    """
    if not is_distributed():
        return chosen.sum().clamp(min=1)
    counts = torch.stack([chosen.sum(), chosen.new_full((), len(chosen), dtype=torch.long)])
    of_chosen, of_all = total(counts)
    return of_chosen.clamp(min=1) * len(chosen) / of_all
