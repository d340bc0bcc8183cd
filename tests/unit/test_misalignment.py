"""Misalignment: every option on an example by hand."""

import pytest
import torch

from cmkt.transfer import CrossModalTransfer, Misalignment
from cmkt.transfer.misalignment import sources

# Two utterances: tokens 1-4 (and padding -1) and 5-10, three frames a token.
TOKENS, FRAMES = torch.tensor([4, 6]), torch.tensor([12, 18])
IDS = torch.tensor([[1, 2, 3, 4, -1, -1], [5, 6, 7, 8, 9, 10]])
SPOKEN = IDS.repeat_interleave(3, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def move(progress=0.0, **conf):
    """Apply to the example; what is returned holds the numbers of the tokens."""
    inputs = SPOKEN[..., None].float(), FRAMES, IDS[..., None].float(), TOKENS
    return Misalignment(**conf)(*inputs, IDS, progress)


def numbers(sequence):
    return sequence.squeeze(-1).long().tolist()


def assert_only(moved, *changed):
    """All but `changed` are as they came."""
    untouched = {"acoustic": SPOKEN, "queries": IDS, "targets": IDS}
    for name, expected in untouched.items():
        assert (numbers(getattr(moved, name)) == expected.tolist()) == (name not in changed), name
    assert numbers(moved.queries) == moved.query_ids.tolist()
    assert numbers(moved.targets) == moved.target_ids.tolist()
    assert (moved.positions is None) == ("queries" not in changed)


# Edges


@pytest.mark.parametrize(
    ("by", "edges", "expected"),
    [
        ([1, 2], "pad", [[2, 3, 4, 4, -1, -1], [7, 8, 9, 10, 10, 10]]),
        ([-1, -2], "pad", [[1, 1, 2, 3, -1, -1], [5, 5, 5, 6, 7, 8]]),
        ([9, -9], "pad", [[4, 4, 4, 4, -1, -1], [5, 5, 5, 5, 5, 5]]),
        ([1, 2], "wrap", [[2, 3, 4, 1, -1, -1], [7, 8, 9, 10, 5, 6]]),
        ([-1, -2], "wrap", [[4, 1, 2, 3, -1, -1], [9, 10, 5, 6, 7, 8]]),
        ([0, 6], "wrap", IDS.tolist()),
        ([1, -2], "clip", [[2, 3, 4, 4, -1, -1], [5, 5, 5, 6, 7, 8]]),
    ],
)
def test_edges_by_hand(by, edges, expected):
    source, inside = sources(TOKENS, 6, torch.tensor(by), edges)
    assert IDS.gather(1, source).tolist() == expected
    outside = [[0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]] if edges == "clip" else [[0] * 6] * 2
    assert (~inside).int().tolist() == outside


def test_clipped_frames_leave_out_the_tokens_whose_place_they_hold():
    """18 frames, 6 tokens: frames 0-2 belong to token 0, its middle is frame 1."""
    clip = {"mode": "fixed", "unit": "frame", "edges": "clip"}
    for maximum, first, second in (
        (1, [1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
        (2, [1, 1, 1, 0], [1, 1, 1, 1, 1, 0]),
        (5, [1, 1, 0, 0], [1, 1, 1, 1, 0, 0]),
        (99, [0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ):
        valid = move(maximum=maximum, **clip).valid.int().tolist()
        assert (valid[0][:4], valid[1]) == (first, second), maximum


# What moves


def test_targets_move():
    moved = move(mode="fixed", maximum=1)
    assert numbers(moved.targets) == [[2, 3, 4, 4, -1, -1], [6, 7, 8, 9, 10, 10]]
    assert_only(moved, "targets")
    assert moved.valid.all()
    clipped = move(mode="fixed", maximum=1, edges="clip")
    assert clipped.valid[:, 3].tolist() == [False, True]
    assert clipped.valid[:, 5].tolist() == [True, False]


def test_queries_move():
    moved = move(mode="fixed", maximum=1, side="queries")
    assert numbers(moved.queries) == [[2, 3, 4, 4, -1, -1], [6, 7, 8, 9, 10, 10]]
    assert moved.positions.tolist() == [[1, 2, 3, 3, 4, 5], [1, 2, 3, 4, 5, 5]]
    assert_only(moved, "queries")


def test_frames_move():
    moved = move(mode="fixed", unit="frame", maximum=2)
    assert numbers(moved.acoustic)[1] == [
        *[5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 10, 10],
    ]
    assert numbers(moved.acoustic)[0][:12] == [1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4]
    assert_only(moved, "acoustic")
    assert moved.valid.all()


def test_without_token_ids():
    inputs = SPOKEN[..., None].float(), FRAMES, IDS[..., None].float(), TOKENS
    for side in ("targets", "queries"):
        moved = Misalignment("fixed", side=side)(*inputs)
        assert moved.query_ids is moved.target_ids is None


# How far


@pytest.mark.parametrize("mode", ["off", False])
def test_nothing_moves_when_off_or_in_evaluation(mode):
    assert_only(move(mode=mode, maximum=3))
    inputs = SPOKEN[..., None].float(), FRAMES, IDS[..., None].float(), TOKENS
    for name in ("fixed", "random", "curriculum", "shuffle"):
        moved = Misalignment(name, maximum=3).eval()(*inputs, IDS)
        assert_only(moved)
        assert moved.valid.all()


def test_random_draws_every_shift_equally_often():
    by = Misalignment("random", maximum=2).draw(torch.full((5000,), 9))
    counts = torch.bincount(by + 2, minlength=5)
    assert len(counts) == 5
    assert (counts / 5000 - 0.2).abs().max() < 0.03


def test_one_shift_for_the_utterance_or_for_the_batch():
    lengths = torch.full((50,), 9)
    own = Misalignment("random", maximum=4)
    common = Misalignment("random", maximum=4, per="batch")
    assert len(set(own.draw(lengths).tolist())) > 5
    draws = [set(common.draw(lengths).tolist()) for _ in range(20)]
    assert all(len(draw) == 1 for draw in draws)
    assert len(set.union(*draws)) > 5


def test_maximum_as_a_share_of_the_length():
    lengths = torch.tensor([1, 4, 10, 50, 100])
    fixed = Misalignment("fixed", maximum_share=0.25).draw(lengths)
    assert fixed.tolist() == [0, 1, 2, 12, 25]
    both = Misalignment("fixed", maximum=3, maximum_share=0.25).draw(lengths)
    assert both.tolist() == [0, 1, 2, 3, 3]
    assert Misalignment("fixed", maximum_share=0.29).draw(lengths)[-1] == 29
    random = Misalignment("random", maximum_share=0.25)
    draws = torch.stack([random.draw(lengths) for _ in range(300)])
    assert (draws.abs() <= fixed).all()
    assert draws.amax(0)[:3].tolist() == [0, 1, 2]
    common = Misalignment("random", maximum_share=0.5, per="batch").draw(torch.tensor([20, 200]))
    assert abs(common[1] / 100 - common[0] / 10) < 0.1  # in proportion


def largest(progress, **conf):
    shifter = Misalignment("curriculum", maximum=4, **conf)
    return [int(shifter.draw(torch.full((500,), 9), p).abs().max()) for p in progress]


def test_curriculum_follows_the_progress_of_the_training():
    progress = [0, 0.125, 0.25, 0.375, 0.5, 1]
    assert largest(progress, until=0.5) == [4, 3, 2, 1, 0, 0]
    assert largest(progress, until=0.5, direction="growing") == [0, 1, 2, 3, 4, 4]
    assert largest(progress) == [4, 4, 3, 2, 2, 0]
    moved = move(0.5, mode="curriculum", until=0.5)
    assert_only(moved)


# Controls


@pytest.mark.parametrize("side", ["targets", "queries"])
def test_shuffle_permutes_each_utterance_on_its_own(side):
    orders = set()
    for _ in range(50):
        moved = move(mode="shuffle", side=side)
        first, second = numbers(getattr(moved, side))
        assert sorted(first[:4]) == [1, 2, 3, 4] and first[4:] == [-1, -1]
        assert sorted(second) == [5, 6, 7, 8, 9, 10]
        other = "queries" if side == "targets" else "targets"
        assert numbers(getattr(moved, other)) == IDS.tolist()
        assert numbers(moved.queries) == moved.query_ids.tolist()
        assert numbers(moved.targets) == moved.target_ids.tolist()
        assert moved.valid.all()
        orders.add(tuple(first))
    assert len(orders) > 15  # of 24


# In the objective


def transfer(**misalignment):
    torch.manual_seed(0)
    conf = {"alignment": {"width": 16, "heads": 2}, "misalignment": misalignment}
    return CrossModalTransfer(6, 5, **conf)


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 18, 6), FRAMES, torch.randn(2, 6, 5), TOKENS


def test_token_shift_moves_the_target_and_the_mask_stays():
    """The loss with a fixed shift of 1 equals the loss against the moved text, by hand."""
    model = transfer(mode="fixed", maximum=1)
    acoustic, frames, text, tokens = inputs()
    moved = text.clone()
    moved[0, :3], moved[1, :5] = text[0, 1:4], text[1, 1:]
    loss = model(acoustic, frames, text, tokens)
    assert torch.allclose(loss, model.eval()(acoustic, frames, moved, tokens))
    assert not torch.allclose(loss, model(acoustic, frames, text, tokens))


def test_clipped_tokens_take_no_part():
    """With a shift of 1 the last token has no target: the mean is over the others."""
    model = transfer(mode="fixed", maximum=1, edges="clip")
    acoustic, frames, text, tokens = inputs()
    loss = model(acoustic, frames, text, tokens)
    zhat = model.align(acoustic, frames, text, tokens).zhat
    distance = 1 - torch.cosine_similarity(zhat[:, :-1], text[:, 1:], dim=-1)
    assert torch.allclose(loss, (distance[0, :3].mean() + distance[1].mean()) / 2)


def test_position_queries_are_asked_for_the_place_of_another_token():
    """Nothing of the text is read, so the answer of place t + 1 is compared with z_t."""
    model = transfer(mode="fixed", maximum=1, side="queries", edges="clip")
    acoustic, frames, text, tokens = inputs()
    loss = model(acoustic, frames, text, tokens)
    zhat = model.align(acoustic, frames, text, tokens).zhat
    distance = 1 - torch.cosine_similarity(zhat[:, 1:], text[:, :-1], dim=-1)
    assert torch.allclose(loss, (distance[0, :3].mean() + distance[1].mean()) / 2)


def test_text_queries_are_given_another_text_in_their_place():
    conf = {"alignment": {"width": 16, "heads": 2, "query": "text"}}
    shifted = {"mode": "fixed", "maximum": 1, "side": "queries", "edges": "wrap"}
    model = CrossModalTransfer(6, 5, misalignment=shifted, **conf)
    acoustic, frames, text, tokens = inputs()
    moved = text.clone()
    moved[0, :4], moved[1] = text[0, [1, 2, 3, 0]], text[1].roll(-1, 0)
    zhat = model.align(acoustic, frames, moved, tokens).zhat
    distance = 1 - torch.cosine_similarity(zhat, text, dim=-1)
    expected = (distance[0, :4].mean() + distance[1].mean()) / 2
    assert torch.allclose(model(acoustic, frames, text, tokens), expected)


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ({"mode": "sometimes"}, "misalignment.mode .* off, fixed, random, curriculum, shuffle"),
        ({"mode": True}, "misalignment.mode"),
        ({"unit": "second"}, "misalignment.unit .* token, frame"),
        ({"side": "text"}, "misalignment.side .* targets, queries, acoustic"),
        ({"side": "acoustic"}, "side acoustic does not go with misalignment.unit token"),
        ({"side": "queries", "unit": "frame"}, "side queries does not go with .*unit frame"),
        ({"mode": "shuffle", "unit": "frame"}, "shuffle needs misalignment.unit token"),
        ({"edges": ["pad"]}, "misalignment.edges"),
        ({"maximum": -1}, "misalignment.maximum"),
        ({"maximum": 1.5}, "misalignment.maximum"),
        ({"maximum_share": 1.5}, "misalignment.maximum_share"),
        ({"per": "speaker"}, "misalignment.per .* utterance, batch"),
        ({"direction": "down"}, "misalignment.direction .* shrinking, growing"),
        ({"until": 0}, "misalignment.until"),
        ({"max": 1}, "misalignment: unknown key max .known: mode, unit, side, maximum"),
    ],
)
def test_wrong_settings_are_named(conf, words):
    with pytest.raises(ValueError, match=words):
        CrossModalTransfer(6, 5, misalignment=conf)
