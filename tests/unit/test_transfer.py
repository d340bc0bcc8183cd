"""The transfer core: no leak, no padding, no NaN; looks in time order; shifts as stated."""

import pytest
import torch
from torch.nn import functional as F

from cmkt.transfer import (
    CrossModalityTransformer,
    CrossModalTransfer,
)

D_A, D_T = 6, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(acoustic_lengths=(20, 13), text_lengths=(6, 4)):
    acoustic_lengths, text_lengths = torch.tensor(acoustic_lengths), torch.tensor(text_lengths)
    acoustic = torch.randn(len(acoustic_lengths), int(acoustic_lengths.max()), D_A)
    text = torch.randn(len(text_lengths), int(text_lengths.max()), D_T)
    return acoustic, acoustic_lengths, text, text_lengths


def transfer(**conf):
    conf = {"alignment": {"width": 16, "heads": 2}, **conf}
    return CrossModalTransfer(D_A, D_T, **conf)


# Alignment


def test_shapes_and_attention_weights_cover_only_valid_frames():
    model = CrossModalityTransformer(D_A, D_T, width=16, heads=2, layers=2)
    acoustic, acoustic_lengths, text, text_lengths = batch()
    aligned = model(acoustic, acoustic_lengths, text, text_lengths, need_weights=True)
    zhat, weights = aligned.zhat, aligned.weights
    assert zhat.shape == text.shape
    assert weights.shape == (2, 6, 20)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 6))
    assert weights[1, :, 13:].abs().max() == 0
    quick = model(acoustic, acoustic_lengths, text, text_lengths)
    assert quick.weights is None
    assert torch.allclose(zhat, quick.zhat)


@pytest.mark.parametrize("query", ["position", "text"])
@pytest.mark.parametrize("padding", [0, 30])
def test_fresh_module_looks_near_the_place_of_the_token(query, padding):
    """Token t of T_t looks near frame t T_a / T_t, for lengths and padding of all sizes."""
    lengths = [(100, 10), (300, 25), (60, 30), (37, 4)]
    for number in range(5):
        torch.manual_seed(number)
        model = CrossModalityTransformer(D_A, D_T, query=query)
        acoustic, acoustic_lengths, text, text_lengths = batch(*zip(*lengths, strict=True))
        acoustic = F.pad(acoustic, (0, 0, 0, padding))
        text = F.pad(text, (0, 0, 0, padding))
        aligned = model(acoustic, acoustic_lengths, text, text_lengths, need_weights=True)
        weights = aligned.weights
        for row, (frames, tokens) in zip(weights, lengths, strict=True):
            place = (torch.arange(tokens) + 0.5) / tokens
            centre = row[:tokens, :frames] @ ((torch.arange(frames) + 0.5) / frames)
            # At both ends the frames are all on one side.
            inner = slice(tokens // 4, tokens - tokens // 4)
            assert (centre - place)[inner].abs().max() < 1 / tokens
            assert (centre - place).abs().max() < 2 / tokens
            assert (centre.diff() > 0).all()
            near = ((torch.arange(frames) + 0.5) / frames - place[:, None]).abs() < 4 / tokens
            assert (row[:tokens, :frames] * near).sum(-1).min() > 0.8


@pytest.mark.parametrize("residual", [True, False])
def test_position_queries_cannot_leak_the_text_and_text_queries_do(residual):
    acoustic, acoustic_lengths, text, text_lengths = batch()
    for query, leaks in (("position", False), ("text", True)):
        model = CrossModalityTransformer(D_A, D_T, width=16, query=query, residual=residual)
        one = model(acoustic, acoustic_lengths, text, text_lengths).zhat
        other = model(acoustic, acoustic_lengths, torch.randn_like(text), text_lengths).zhat
        assert (one - other).abs().max().gt(1e-4) == leaks, query
        heard = model(torch.randn_like(acoustic), acoustic_lengths, text, text_lengths).zhat
        assert (one - heard).abs().max() > 1e-4


def test_residual_adds_the_query():
    """Without acoustic content in the values only the residual tells the tokens apart."""
    for residual in (True, False):
        model = CrossModalityTransformer(D_A, D_T, width=16, residual=residual)
        torch.nn.init.zeros_(model.layers[0].attention.value.weight)
        zhat = model(*batch()).zhat
        assert (zhat.std(1).max() > 1e-4) == residual


@pytest.mark.parametrize("query", ["position", "text"])
@pytest.mark.parametrize("rubbish", [7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(query, rubbish):
    model = transfer(alignment={"width": 16, "query": query, "layers": 2})
    acoustic, acoustic_lengths, text, text_lengths = batch()
    acoustic.requires_grad_()
    loss = model(acoustic, acoustic_lengths, text, text_lengths)
    (gradient,) = torch.autograd.grad(loss, acoustic)
    with torch.no_grad():
        long_acoustic = F.pad(acoustic, (0, 0, 0, 9), value=rubbish)
        long_acoustic[1, 13:] = rubbish
        long_text = F.pad(text, (0, 0, 0, 3), value=rubbish)
        long_text[1, 4:] = rubbish
    long_acoustic.requires_grad_()
    padded = model(long_acoustic, acoustic_lengths, long_text, text_lengths)
    (padded_gradient,) = torch.autograd.grad(padded, long_acoustic)
    assert abs(loss - padded) < 1e-6
    assert (padded_gradient[:, :20] - gradient).abs().max() < 1e-6
    assert padded_gradient[:, 20:].abs().max() == padded_gradient[1, 13:].abs().max() == 0
    if rubbish == 7.0:
        one = model.diagnostics(acoustic, acoustic_lengths, text, text_lengths)
        two = model.diagnostics(long_acoustic, acoustic_lengths, long_text, text_lengths)
        assert all(abs(one[key] - two[key]) < 1e-6 for key in one)


def test_sharp_order_prior_and_no_valid_frame_stay_finite():
    model = transfer()
    with torch.no_grad():
        model.alignment.layers[0].attention.log_sigma.fill_(-15.0)
    acoustic, _, text, text_lengths = batch()
    for lengths in ([20, 13], [20, 0], [1, 0]):
        model.zero_grad()
        loss = model(acoustic, torch.tensor(lengths), text, text_lengths)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        aligned = model.align(acoustic, torch.tensor(lengths), text, text_lengths)
        assert aligned.weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_alignment_in_float32(dtype):
    model = transfer()
    acoustic, acoustic_lengths, text, text_lengths = batch()
    acoustic, text = acoustic.to(dtype), text.to(dtype)
    expected = model(acoustic.float(), acoustic_lengths, text.float(), text_lengths)
    acoustic.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(acoustic, acoustic_lengths, text, text_lengths)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss == expected
    assert acoustic.grad.isfinite().all() and acoustic.grad.ne(0).any()


# Loss


def test_utterance_without_transcript_has_no_loss():
    model = transfer()
    acoustic, acoustic_lengths, text, text_lengths = batch()
    alone = model(acoustic[:1], acoustic_lengths[:1], text[:1], text_lengths[:1])
    text[1], text_lengths[1] = 0, 1
    acoustic.requires_grad_()
    loss = model(acoustic, acoustic_lengths, text, text_lengths)
    loss.backward()
    assert torch.allclose(loss, alone)
    assert acoustic.grad[1].abs().max() == 0 < acoustic.grad[0].abs().max()


@pytest.mark.parametrize("query", ["position", "text"])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_batch_without_any_text_is_zero_and_reaches_every_parameter(query, tokens):
    mode = {"mode": "random", "maximum": 2}
    model = transfer(alignment={"width": 16, "query": query}, misalignment=mode)
    acoustic, acoustic_lengths, _, _ = batch()
    text = torch.zeros(2, tokens, D_T)
    lengths = torch.full((2,), min(tokens, 1))
    loss = model(acoustic, acoustic_lengths, text, lengths)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())
    assert model.diagnostics(acoustic, acoustic_lengths, text, lengths) == {}


@pytest.mark.parametrize("query", ["position", "text"])
def test_gradients_reach_the_acoustics_and_never_the_text(query):
    model = transfer(alignment={"width": 16, "query": query})
    acoustic, acoustic_lengths, text, text_lengths = batch()
    acoustic.requires_grad_()
    text.requires_grad_()
    model(acoustic, acoustic_lengths, text, text_lengths).backward()
    assert acoustic.grad.ne(0).any(-1)[0].all()
    assert text.grad is None
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_combine():
    model = transfer(alpha=0.25)
    assert model.combine(torch.tensor(2.0), torch.tensor(4.0)) == 3.5


# Diagnostics


def train_on_codes(query: str) -> dict[str, float]:
    """Train on utterances whose acoustics spell their text; return unseen diagnostics."""
    codebook = torch.randn(8, D_T)
    spoken = torch.randn(8, D_A)

    def sample():
        words = torch.randint(8, (16, 4))
        acoustic = spoken[words].repeat_interleave(5, 1)
        return acoustic, torch.full((16,), 20), codebook[words], torch.full((16,), 4)

    model = transfer(alignment={"width": 32, "query": query})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model(*sample()).backward()
        optimizer.step()
    return {key: value.item() for key, value in model.eval().diagnostics(*sample()).items()}


def test_gap_tells_transfer_from_leakage():
    """Both cosines rise; only with position queries does it matter whose acoustics they are."""
    heard = train_on_codes("position")
    assert heard["cos_matched"] > 0.8
    assert heard["transfer_gap"] > 0.4
    leaked = train_on_codes("text")
    assert leaked["cos_matched"] > 0.8
    assert leaked["cos_mismatched"] > 0.8
    assert leaked["transfer_gap"] < 0.1


def test_diagnostics_roll_only_those_with_text_and_need_two():
    model = transfer().eval()
    acoustic, acoustic_lengths, text, text_lengths = batch((20, 13, 17), (6, 1, 4))
    text[1] = 0
    with_text = torch.tensor([0, 2])
    values = model.diagnostics(acoustic, acoustic_lengths, text, text_lengths)
    assert values == model.diagnostics(
        *(x[with_text] for x in (acoustic, acoustic_lengths, text, text_lengths))
    )
    assert values["transfer_gap"] == values["cos_matched"] - values["cos_mismatched"]
    assert not values["cos_matched"].requires_grad
    text[2] = 0
    assert model.diagnostics(acoustic, acoustic_lengths, text, text_lengths) == {}


# Arguments


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": "half"}, "alpha"),
        ({"reduction": "max"}, "reduction .* mean, sum"),
        ({"alignment": {"head": 4}}, "alignment .transformer.: unknown key head .* mean heads"),
        ({"alignment": {"type": "sinkorn"}}, "alignment.type .* did you mean sinkhorn"),
        ({"alignment": {"heads": "four"}}, "alignment.heads .*'four'"),
        ({"alignment": {"heads": 3, "width": 16}}, "heads 3 does not divide"),
        ({"alignment": {"layers": 0}}, "alignment.layers"),
        ({"alignment": {"width": 16.0}}, "alignment.width"),
        ({"alignment": {"dropout": 1.0}}, "alignment.dropout"),
        ({"alignment": {"query": "audio"}}, "alignment.query must be one of position, text"),
        ({"alignment": {"residual": "no"}}, "alignment.residual"),
        ({"alignment": [1]}, "alignment must be a mapping"),
        (
            {"misalignment": {"max": 1}},
            "misalignment: unknown key max .known: mode, unit, side, maximum",
        ),
    ],
)
def test_wrong_arguments_are_named(conf, words):
    with pytest.raises(ValueError, match=words):
        CrossModalTransfer(D_A, D_T, **conf)
