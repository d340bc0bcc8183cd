"""The optimal-transport alignments: equal to POT, blind to padding, each good for its purpose."""

import warnings

import ot
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmkt.transfer.alignment import build_alignment
from cmkt.transfer.sequences import order_distance

D_A, D_T = 6, 5
KINDS = ("sinkhorn", "temporal_order", "unbalanced", "gromov_wasserstein")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(kind, acoustic_dim=D_A, linguistic_dim=D_T, **conf):
    return build_alignment({"type": kind, **conf}, acoustic_dim, linguistic_dim)


def batch(acoustic_lengths=(20, 13), text_lengths=(6, 4)):
    acoustic_lengths, text_lengths = torch.tensor(acoustic_lengths), torch.tensor(text_lengths)
    acoustic = torch.randn(len(acoustic_lengths), int(acoustic_lengths.max()), D_A)
    text = torch.randn(len(text_lengths), int(text_lengths.max()), D_T)
    return acoustic, acoustic_lengths, text, text_lengths


def projected(model, acoustic):
    """Return the frames in the text space, made in the plain way."""
    return model.project.to_text(model.project.from_acoustic(acoustic))


def utterances(model, acoustic, acoustic_lengths, text, text_lengths):
    """Yield, without padding, z, f and C of each utterance, float64."""
    for f, m, z, n in zip(
        projected(model, acoustic), acoustic_lengths, text, text_lengths, strict=True
    ):
        z, f = z[:n].detach().double(), f[:m].detach().double()
        yield z, f, 1 - F.cosine_similarity(z[:, None], f[None], dim=-1)


def uniform(distance):
    return [torch.full((size,), 1 / size, dtype=torch.float64) for size in distance.shape]


# Equality with POT


@pytest.mark.parametrize("eps", [0.3, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_plan_zhat_and_cost_are_those_of_pot(kind, eps):
    """In a padded batch, against POT in float64 on each utterance alone."""
    more = {"steps": 40} if kind == "gromov_wasserstein" else {}
    model = build(kind, width=4, eps=eps, iterations=120, **more)
    data = batch()
    aligned = model(*data, need_weights=True)
    distances = order_distance(data[3], 6, data[1], 20)
    for row, (z, f, distance) in enumerate(utterances(model, *data)):
        a, b = uniform(distance)
        if kind in ("sinkhorn", "temporal_order"):
            if kind == "temporal_order":
                place = distances[row, : len(z), : len(f)]
                plan = ot.sinkhorn(a, b, distance + eps * place / 8, eps, "sinkhorn_log")
            else:
                plan = ot.sinkhorn(a, b, distance, eps, "sinkhorn_log")
            cost = (plan * distance).sum()
        elif kind == "unbalanced":
            plan = ot.unbalanced.sinkhorn_unbalanced(
                a, b, distance, eps, (10.0, 0.1), reg_type="kl", stopThr=1e-12
            )
            cost = (plan * distance).sum()
        else:
            inner = [1 - F.cosine_similarity(x[:, None], x[None], dim=-1) for x in (z, f)]
            plan, log = ot.gromov.entropic_fused_gromov_wasserstein(
                distance, *inner, a, b, epsilon=eps, alpha=0.5, max_iter=40, log=True
            )
            cost = log["fgw_dist"]
        weights = (plan / plan.sum(1, keepdim=True)).float()
        assert (aligned.weights[row, : len(z), : len(f)] - weights).abs().max() < 1e-3
        assert (aligned.zhat[row, : len(z)] - weights @ f.float()).abs().max() < 1e-3
        assert aligned.cost[row].item() == pytest.approx(cost.item(), abs=1e-4)


def test_no_frame_penalty_is_softmax_attention():
    model = build("unbalanced", frame_penalty=0)
    data = batch((20,), (6,))
    ((_, _, distance),) = utterances(model, *data)
    weights = model(*data, need_weights=True).weights[0]
    assert torch.allclose(weights.double(), (-distance / 0.1).softmax(1), atol=1e-5)


def test_structure_of_zero_is_plain_transport():
    plain, fused = build("sinkhorn"), build("gromov_wasserstein", structure=0)
    fused.load_state_dict(plain.state_dict())
    data = batch()
    assert torch.allclose(plain(*data).zhat, fused(*data).zhat, atol=1e-4)
    assert torch.allclose(plain(*data).cost, fused(*data).cost, atol=1e-4)


# Gradients


def test_gradient_of_the_cost_is_that_of_the_regularised_problem():
    """Against differentiating all iterations of the regularised optimum."""
    model = build("sinkhorn", eps=0.2, iterations=200)
    acoustic, acoustic_lengths, text, text_lengths = batch((20, 20), (6, 6))
    acoustic.requires_grad_()
    cost = model(acoustic, acoustic_lengths, text, text_lengths).cost.sum()
    (gradient,) = torch.autograd.grad(cost, acoustic)
    frames = projected(model, acoustic)
    distance = 1 - F.cosine_similarity(text[:, :, None], frames[:, None], dim=-1)
    of_frames = torch.zeros(2, 20)
    for _ in range(200):
        of_tokens = -((of_frames[:, None] - distance) / 0.2).logsumexp(2) * 0.2
        of_frames = -((of_tokens[:, :, None] - distance) / 0.2).logsumexp(1) * 0.2
    dual = of_tokens.mean(1) + of_frames.mean(1)  # the optimum, up to a constant
    (expected,) = torch.autograd.grad(dual.sum(), acoustic)
    assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_zhat_and_cost_reach_every_parameter_and_never_the_text(kind):
    model = build(kind)
    acoustic, acoustic_lengths, text, text_lengths = batch()
    acoustic.requires_grad_()
    for output in ("zhat", "cost"):
        model.zero_grad()
        aligned = model(acoustic, acoustic_lengths, text, text_lengths)
        (gradient,) = torch.autograd.grad(
            getattr(aligned, output).square().sum(), acoustic, retain_graph=True
        )
        assert gradient[0].ne(0).any(-1).all()
        getattr(aligned, output).square().sum().backward()
        assert all(p.grad is not None and p.grad.ne(0).any() for p in model.parameters())


# Padding, lengths, precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rubbish", [7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(kind, rubbish):
    model = build(kind)
    acoustic, acoustic_lengths, text, text_lengths = batch()

    def outcome(acoustic, text):
        acoustic = acoustic.clone().requires_grad_()
        aligned = model(acoustic, acoustic_lengths, text, text_lengths, need_weights=True)
        real = aligned.zhat[0, :6].sum() + aligned.zhat[1, :4].square().sum()
        (gradient,) = torch.autograd.grad(real + aligned.cost.sum(), acoustic)
        return aligned, gradient

    one, gradient = outcome(acoustic, text)
    acoustic, text = (F.pad(x, (0, 0, 0, 5), value=rubbish) for x in (acoustic, text))
    acoustic[1, 13:], text[1, 4:] = rubbish, rubbish
    two, padded_gradient = outcome(acoustic, text)
    assert (two.zhat[:, :6] - one.zhat).abs().max() < 1e-5
    assert (two.weights[:, :6, :20] - one.weights).abs().max() < 1e-5
    assert two.weights[1, 4:].abs().max() == two.weights[1, :, 13:].abs().max() == 0
    assert torch.allclose(two.weights[1, :4].sum(-1), torch.ones(4))
    assert (two.cost - one.cost).abs().max() < 1e-5
    assert (padded_gradient[:, :20] - gradient).abs().max() < 1e-5
    assert padded_gradient[:, 20:].abs().max() == padded_gradient[1, 13:].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("frames", "tokens"), [([20, 0], [6, 4]), ([0, 0], [3, 1]), ([1, 20], [1, 0]), ([5, 1], [0, 0])]
)
def test_empty_utterances_stay_finite_and_attached(kind, frames, tokens):
    model = build(kind)
    for spare in (0, 2):  # without padding, some sizes are 0
        acoustic = torch.randn(2, max(frames) + spare, D_A, requires_grad=True)
        text = torch.randn(2, max(tokens) + spare, D_T)
        aligned = model(
            acoustic, torch.tensor(frames), text, torch.tensor(tokens), need_weights=True
        )
        assert aligned.zhat.shape == text.shape
        assert all(x.isfinite().all() for x in (aligned.zhat, aligned.weights, aligned.cost))
        for row in range(2):
            if not frames[row] or not tokens[row]:
                assert aligned.cost[row] == 0
                assert aligned.weights[row].sum() == 0
        model.zero_grad()
        (aligned.zhat.sum() + aligned.cost.sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert acoustic.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_missing_transcript_and_silence_stay_finite(kind):
    model = build(kind)
    acoustic, acoustic_lengths, text, _ = batch()
    acoustic[1], text[1] = 0.0, 0.0
    acoustic.requires_grad_()
    aligned = model(acoustic, acoustic_lengths, text, torch.tensor([6, 1]))
    (aligned.zhat.sum() + aligned.cost.sum()).backward()
    assert aligned.zhat.isfinite().all() and acoustic.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:optimal transport has not converged")
@pytest.mark.parametrize("kind", KINDS)
def test_sharp_and_long_is_stable(kind):
    """A token for each 8 frames, 4000 frames, eps 0.01, and one short utterance beside it."""
    steps = {"steps": 2} if kind == "gromov_wasserstein" else {}
    model = identity(build(kind, D_T, D_T, width=D_T, eps=0.01, iterations=15, **steps))
    text = torch.randn(2, 512, D_T)
    acoustic = text.repeat_interleave(8, 1)[:, :4000] + 0.3 * torch.randn(2, 4000, D_T)
    acoustic.requires_grad_()
    lengths = torch.tensor([4000, 30]), torch.tensor([500, 4])
    aligned = model(acoustic, lengths[0], text, lengths[1], need_weights=True)
    assert torch.allclose(aligned.weights[0, :500].sum(-1), torch.ones(500), atol=1e-4)
    (aligned.zhat[0].sum() + aligned.cost.sum()).backward()
    assert acoustic.grad.isfinite().all() and aligned.cost.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_alignment_in_float32(kind):
    model = build(kind)
    acoustic, acoustic_lengths, text, text_lengths = batch()
    acoustic, text = acoustic.bfloat16(), text.bfloat16()
    expected = model(acoustic.float(), acoustic_lengths, text.float(), text_lengths).zhat
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zhat = model(acoustic, acoustic_lengths, text, text_lengths).zhat
    assert zhat.dtype == torch.float32
    assert torch.equal(zhat, expected)


# Convergence


def test_too_few_iterations_warn_once_and_enough_do_not():
    text = torch.randn(1, 12, D_T)
    acoustic = text.repeat_interleave(torch.arange(1, 13), 1)  # words of all lengths
    lengths = torch.tensor([acoustic.shape[1]]), torch.tensor([12])
    few = identity(build("sinkhorn", D_T, D_T, width=D_T, eps=0.01, iterations=2))
    with pytest.warns(UserWarning, match=r"not converged: \d+\.\d% .* 2 iterations with eps 0.01"):
        few(acoustic, lengths[0], text, lengths[1])
    enough = identity(build("sinkhorn", D_T, D_T, width=D_T, eps=0.1, iterations=200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough(acoustic, lengths[0], text, lengths[1])
        for _ in range(5):
            few(acoustic, lengths[0], text, lengths[1])


# What each is for


def identity(model):
    """Make the projection the identity, so that acoustics can be written as token embeddings."""
    model.project.from_acoustic = nn.Identity()
    nn.init.eye_(model.project.to_text.weight)
    nn.init.zeros_(model.project.to_text.bias)
    return model


def speak(words, frames=5, width=24):
    """Return (1, T_t, D) embeddings of words and the (1, T_a, D) frames that spell them."""
    codebook = F.normalize(torch.randn(max(words) + 1, width), dim=-1)
    text = codebook[torch.tensor(words)][None]
    spoken = text.repeat_interleave(frames, 1)
    return text, spoken + 0.05 * torch.randn_like(spoken)


def align(kind, text, acoustic, **conf):
    """Return the weights (T_t, T_a)."""
    width = text.shape[2]
    model = identity(build(kind, width, width, width=width, **conf))
    lengths = torch.tensor([acoustic.shape[1]]), torch.tensor([text.shape[1]])
    return model(acoustic, lengths[0], text, lengths[1], need_weights=True).weights[0]


def by_word(weights, frames=5):
    """Return how much of each token's weight lies on each word's frames (T_t, words)."""
    return weights.unflatten(1, (-1, frames)).sum(2)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_get_their_own_frames(kind):
    text, acoustic = speak([0, 1, 2, 3, 4, 5])
    share = by_word(align(kind, text, acoustic))
    assert share.diagonal().min() > 0.9


def test_temporal_order_tells_repeated_words_apart_and_sinkhorn_does_not():
    text, acoustic = speak([0, 1, 0, 2, 0, 3])
    plain = by_word(align("sinkhorn", text, acoustic))
    assert torch.allclose(plain[0, [0, 2, 4]], torch.full((3,), 1 / 3), atol=0.1)
    ordered = by_word(align("temporal_order", text, acoustic, sigma=1.0))
    assert ordered.argmax(1).tolist() == [0, 1, 2, 3, 4, 5]
    assert ordered.diagonal()[[0, 2, 4]].min() > 0.7
    wide = by_word(align("temporal_order", text, acoustic, sigma=100.0))
    assert torch.allclose(wide, plain, atol=1e-2)


def test_unbalanced_leaves_noise_frames_free_and_sinkhorn_must_place_them():
    text, acoustic = speak([0, 1, 2, 3])
    noise = F.normalize(torch.randn(1, 20, text.shape[2]), dim=-1)
    acoustic = torch.cat([acoustic, noise], 1)
    balanced, free = (align(kind, text, acoustic) for kind in ("sinkhorn", "unbalanced"))
    assert balanced[:, 20:].sum(1).mean() == pytest.approx(0.5, abs=1e-3)
    assert free[:, 20:].sum(1).max() < 0.1
    assert by_word(free[:, :20]).diagonal().min() > 0.85
    forced = align("unbalanced", text, acoustic, frame_penalty=1000.0)
    assert torch.allclose(forced, balanced, atol=0.02)


def test_structure_matches_sides_that_share_no_direction():
    """Frames are the rotated embeddings: only distances among themselves tell which is which."""
    angle = torch.tensor([0.0, 0.2, 0.6, 1.3, 2.3])
    text = torch.stack([angle.cos(), angle.sin()], -1)[None]
    text = F.pad(text, (0, 2))
    acoustic = text.roll(2, 2).repeat_interleave(5, 1)  # orthogonal to all the text
    blind = by_word(align("sinkhorn", text, acoustic, eps=0.01))
    assert torch.allclose(blind, torch.full((5, 5), 0.2), atol=1e-3)
    found = by_word(align("gromov_wasserstein", text, acoustic, eps=0.01, structure=1.0, steps=20))
    assert found.argmax(1).tolist() == [0, 1, 2, 3, 4]
    assert found.diagonal().min() > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_learns_from_acoustics_that_spell_the_text(kind):
    """On unseen utterances the own acoustics fit better than those of another."""
    codebook, spoken = torch.randn(8, D_T), torch.randn(8, D_A)
    frames, tokens = torch.full((16,), 20), torch.full((16,), 4)

    def sample():
        words = torch.randint(8, (16, 4))
        return spoken[words].repeat_interleave(5, 1), codebook[words]

    def cosine(acoustic, text):
        zhat = model(acoustic, frames, text, tokens).zhat
        return F.cosine_similarity(zhat, text, dim=-1).mean()

    steps = {"steps": 2} if kind == "gromov_wasserstein" else {}
    model = build(kind, width=16, iterations=15, **steps)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        (1 - cosine(*sample())).backward()
        optimizer.step()
    acoustic, text = sample()
    assert cosine(acoustic, text) > 0.85
    assert cosine(acoustic, text) - cosine(acoustic.roll(1, 0), text) > 0.2


# Settings


@pytest.mark.parametrize(
    ("kind", "conf", "words"),
    [
        *[(kind, {"eps": 0}, "alignment.eps must be a number of at least 0.001") for kind in KINDS],
        ("sinkhorn", {"iterations": 0}, "alignment.iterations"),
        ("sinkhorn", {"width": 8.0}, "alignment.width"),
        ("sinkhorn", {"sigma": 1.0}, "unknown key sigma .known: width, eps, iterations"),
        ("temporal_order", {"sigma": 0}, "alignment.sigma"),
        ("unbalanced", {"token_penalty": 0}, "alignment.token_penalty"),
        ("unbalanced", {"frame_penalty": -1}, "alignment.frame_penalty"),
        ("gromov_wasserstein", {"structure": 1.5}, "alignment.structure"),
        ("gromov_wasserstein", {"steps": 0}, "alignment.steps"),
    ],
)
def test_wrong_settings_are_named(kind, conf, words):
    with pytest.raises(ValueError, match=words):
        build(kind, **conf)
