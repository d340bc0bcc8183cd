"""LSTMs and GRUs that run layer by layer, so that one can listen between two layers.

torch runs all layers of a recurrent network in one call. Layer by layer, and without packing, the
result is the same to rounding (the second direction of an utterance starts at its last valid
frame), with two gains: what layer l has made passes through the module `after.<l>`, where a
tap listens and the feedback adapter acts, and on a CPU a training step is several times faster,
since the backward pass of a packed sequence allocates the whole gradient at every time step.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from cmkt.transfer.sequences import lengths_to_mask


class _LayerByLayer:
    """Replaces the forward pass of `nn.LSTM` or `nn.GRU`; parameters keep their names."""

    after: nn.ModuleList

    def forward(self, input, hx=None):
        """Take and return what the forward pass of `nn.LSTM` or `nn.GRU` does.

        Args:
            input: (B, T, D), or packed with the longest utterance first.
            hx: states (layers * directions, B, H) of what came before.

        Returns:
            outputs (B, T, directions * H), packed if `input` is, and the last states; None in
            their place for utterances of several lengths, whose states end at several frames.
        """
        x, lengths = input, None
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input, batch_first=True)
        uneven = lengths is not None and bool((lengths < x.shape[1]).any())
        states = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(2 if self.bidirectional else 1):
                number = layer * (2 if self.bidirectional else 1) + direction
                order = _backwards(lengths, x) if direction else None
                y, state = self._run(_reorder(x, order), hx, number)
                outputs.append(_reorder(y, order))
                states.append(state)
            x = self.after[layer](torch.cat(outputs, -1))  # (B, T, directions * H)
        last = None if uneven else tuple(torch.cat(part) for part in zip(*states, strict=True))
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return x, last[0] if last and self.mode == "GRU" else last

    def _run(self, x: torch.Tensor, hx, number: int):
        """Run one direction of one layer over x (B, T, D)."""
        kind = torch._VF.gru if self.mode == "GRU" else torch._VF.lstm
        given = (hx,) if torch.is_tensor(hx) else hx
        if given is None:
            zeros = x.new_zeros(1, len(x), self.hidden_size)
            given = (zeros,) if self.mode == "GRU" else (zeros, zeros)
        else:
            given = tuple(state[number : number + 1] for state in given)
        state = given[0] if self.mode == "GRU" else given
        weights = self.all_weights[number]
        y, *last = kind(x, state, weights, self.bias, 1, 0.0, self.training, False, True)
        return y, last


class LayerwiseLSTM(_LayerByLayer, nn.LSTM):
    """`nn.LSTM`, layer by layer."""


class LayerwiseGRU(_LayerByLayer, nn.GRU):
    """`nn.GRU`, layer by layer."""


def run_layer_by_layer(module: nn.Module) -> None:
    """Let all LSTMs and GRUs inside a module run layer by layer, in place.

    Their weights, and the names of these, stay. Left alone are those with `proj_size` or
    without `batch_first`.
    """
    for part in module.modules():
        kind = {nn.LSTM: LayerwiseLSTM, nn.GRU: LayerwiseGRU}.get(type(part))
        if kind and part.batch_first and not part.proj_size:
            part.__class__ = kind
            part.after = nn.ModuleList(nn.Identity() for _ in range(part.num_layers))


def _backwards(lengths: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Return (B, T): the valid frames from last to first, the padding where it is."""
    steps = torch.arange(x.shape[1], device=x.device)[None]
    if lengths is None:
        return steps.flip(1).expand(len(x), -1)
    lengths = lengths.to(x.device)
    return torch.where(lengths_to_mask(lengths, x.shape[1]), lengths[:, None] - 1 - steps, steps)


def _reorder(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return x if order is None else x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
