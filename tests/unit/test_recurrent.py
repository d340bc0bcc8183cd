"""Recurrent layers one by one: torch's results, its states, its weights; a place between layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cmkt.espnet_plugin.recurrent import run_layer_by_layer


def pair(kind, bidirectional, **settings):
    torch.manual_seed(0)
    stock = kind(5, 7, 3, batch_first=True, bidirectional=bidirectional, **settings)
    ours = copy.deepcopy(stock)
    run_layer_by_layer(ours)
    return stock, ours


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_outputs_gradients_and_states_are_those_of_torch(kind, bidirectional):
    stock, ours = pair(kind, bidirectional)
    assert list(stock.state_dict()) == list(ours.state_dict())
    x, lengths = torch.randn(3, 9, 5), torch.tensor([9, 6, 2])
    results = []
    for module in (stock, ours):
        packed, _ = module(pack_padded_sequence(x, lengths, batch_first=True))
        y, found = pad_packed_sequence(packed, batch_first=True)
        assert torch.equal(found, lengths)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in module.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))
    # Equal lengths give states as well, with which a stream goes on.
    (y, states), (z, ours_states) = stock(x), ours(x)
    (more, _), (ours_more, _) = stock(x, states), ours(x, ours_states)
    assert torch.allclose(y, z, atol=1e-6) and torch.allclose(more, ours_more, atol=1e-6)


def test_padding_cannot_change_a_valid_frame():
    _, ours = pair(nn.LSTM, True)
    x, lengths = torch.randn(2, 9, 5), torch.tensor([9, 4])
    other = x.clone()
    other[1, 4:] = 1e3
    a, b = (pad_packed_sequence(ours(pack_padded_sequence(i, lengths, batch_first=True))[0],
                                batch_first=True)[0] for i in (x, other))  # fmt: skip
    assert torch.equal(a, b)


def test_what_is_added_after_a_layer_reaches_the_next():
    _, ours = pair(nn.LSTM, True)
    x = torch.randn(2, 9, 5)
    before, _ = ours(x)
    handle = ours.after[0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert (ours(x)[0] - before).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(ours(x)[0], before)


def test_dropout_between_layers_in_training_only():
    _, ours = pair(nn.LSTM, False, dropout=0.5)
    x = torch.randn(2, 9, 5)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])


def test_modules_that_it_cannot_run_are_left_alone():
    for module in (nn.LSTM(5, 7, proj_size=3, batch_first=True), nn.LSTM(5, 7)):
        run_layer_by_layer(module)
        assert type(module) is nn.LSTM
