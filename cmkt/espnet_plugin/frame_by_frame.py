"""Layers of a trained network made quick for one frame at a time.

A frame is so little work that calling the layers is most of it. Normalisation is folded into the
convolution before it, groups become blocks of one dense layer, and recurrent layers side by side
become one. The results are the same to rounding.
"""

from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def fold_normalisation(convolution: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """Return one dense convolution for a convolution and the batch normalisation after it.

    Args:
        convolution: `nn.Conv2d` or `nn.ConvTranspose2d`, of any number of groups, with a bias.
        norm: its statistics are taken as they are.
    """
    weight, groups = convolution.weight, convolution.groups
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    dense = weight.new_zeros(weight.shape[0], columns * groups, *weight.shape[2:])
    for group in range(groups):
        block = slice(group * rows, (group + 1) * rows)
        dense[block, group * columns : (group + 1) * columns] = weight[block]
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    # Output channels come second in a transposed convolution.
    shape = (1, -1, 1, 1) if isinstance(convolution, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    folded = type(convolution)(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,
        stride=convolution.stride,
        padding=convolution.padding,
        dilation=convolution.dilation,
    ).to(weight)
    folded.weight.copy_(dense * scale.view(shape))
    folded.bias.copy_((convolution.bias - norm.running_mean) * scale + norm.bias)
    return folded.requires_grad_(False)


class MergedGRU(nn.Module):
    """GRUs of one layer side by side, each for its share of the features, as one GRU.

    Args:
        grus: of the same sizes, in one or in both directions.
    """

    @torch.no_grad()
    def __init__(self, grus: Sequence[nn.GRU]):
        super().__init__()
        first = grus[0]
        self.count, self.hidden = len(grus), first.hidden_size
        endings = ("l0", "l0_reverse") if first.bidirectional else ("l0",)
        self.bidirectional = first.bidirectional
        blocks, size = len(endings) * self.count, first.input_size
        like = first.weight_ih_l0
        # Gates, parts and units of the result; parts and features of the input, parts and units of
        # the state. Parts are the GRUs forwards, then backwards.
        of_input = like.new_zeros(3, blocks, self.hidden, blocks, size)
        of_state = like.new_zeros(3, blocks, self.hidden, blocks, self.hidden)
        biases = like.new_zeros(2, 3, blocks, self.hidden)
        parts = [(gru, ending) for ending in endings for gru in grus]
        for part, (gru, ending) in enumerate(parts):
            shape = (3, self.hidden, -1)
            of_input[:, part, :, part] = getattr(gru, f"weight_ih_{ending}").view(shape)
            of_state[:, part, :, part] = getattr(gru, f"weight_hh_{ending}").view(shape)
            biases[0, :, part] = getattr(gru, f"bias_ih_{ending}").view(3, -1)
            biases[1, :, part] = getattr(gru, f"bias_hh_{ending}").view(3, -1)
        units = blocks * self.hidden
        self.weights = [of_input.reshape(3 * units, -1), of_state.reshape(3 * units, -1)]
        self.weights += [bias.flatten() for bias in biases]

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None):
        """Run.

        Args:
            x: (B, L, D), the features of the GRUs side by side.
            state: what an earlier call returned; None at the start.

        Returns:
            outputs (B, L, E), those of the GRUs side by side, and the state after the last step,
            which is of no use after running in both directions.
        """
        if self.bidirectional:
            x = torch.cat([x, x.flip(1)], dim=-1)
        if state is None:
            state = x.new_zeros(x.shape[0], self.weights[1].shape[1])
        if x.shape[1] == 1:
            state = torch.gru_cell(x[:, 0], state, *self.weights)
            y = state.unsqueeze(1)
        else:
            y, state = torch._VF.gru(
                x, state.unsqueeze(0), self.weights, True, 1, 0.0, False, False, True
            )
            state = state[0]
        if self.bidirectional:
            forwards, backwards = y.unflatten(-1, (2, self.count, self.hidden)).unbind(-3)
            y = torch.stack([forwards, backwards.flip(1)], dim=-2).flatten(-3)
        return y, state
