"""Taps: every separator, any module's path, layouts, pooling, several taps, errors."""

import re

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, tiny_config, transfer_conf
from tiny_separators import SEPARATORS, separator_config
from torch import nn

from cmkt.cli import main
from cmkt.enhance.loading import Enhancer
from cmkt.errors import CmktError
from cmkt.espnet_plugin.build import build_enhancement_model
from cmkt.espnet_plugin.layouts import find_layout, to_frames
from cmkt.espnet_plugin.listening import find_listeners, listen, pool_bands, pool_time
from cmkt.espnet_plugin.model import add_transfer
from cmkt.espnet_plugin.taps import TAPS, UNTAPPED, find_taps

RATE = 16000
ALL_TAPS = [(separator, tap) for separator, taps in TAPS.items() for tap in taps]


def build(config, seed=0, **conf):
    """Return a model of ours with transfer, without training losses."""
    torch.manual_seed(seed)
    model = build_enhancement_model(config)
    conf = transfer_conf(linguistic_dim=6, **conf)
    return add_transfer(model, config["separator"], conf, {}, RATE)


def build_with_losses(name, **conf):
    """Return the model of a training, and its configuration."""
    from cmkt.espnet_plugin.task import TransferEnhancementTask

    args = TransferEnhancementTask.get_parser().parse_args(["--output_dir", "unused"])
    conf = transfer_conf(linguistic_dim=6, **conf)
    config = {**separator_config(name), "transfer": "cmkt", "transfer_conf": conf}
    for key, value in config.items():
        setattr(args, key, value)
    torch.manual_seed(0)
    return TransferEnhancementTask.build_model(args), config


def batch(samples=8000, generator=0):
    """Return three utterances, the second without a transcript."""
    draw = torch.Generator().manual_seed(generator)
    speech = 0.1 * torch.randn(3, samples, generator=draw)
    text = torch.randn(3, 4, 6, generator=draw)
    text[1] = 0
    lengths = torch.tensor([samples, samples * 3 // 4, samples // 2])
    return {
        "speech_mix": speech,
        "speech_mix_lengths": lengths,
        "speech_ref1": speech / 2,
        "speech_ref1_lengths": lengths,
        "linguistic": text,
        "linguistic_lengths": torch.tensor([4, 1, 3]),
        "token_ids": torch.arange(12).view(3, 4),
        "token_ids_lengths": torch.tensor([4, 1, 3]),
    }


def hear(model, speech, lengths):
    with listen(model.separator, {*model.taps, *model.stream}) as heard:
        model.forward_enhance(speech, lengths, {})
    return heard


def test_every_separator_of_espnet_has_taps_or_a_reason():
    """A separator gained later is listed here: add it to TAPS, with a tiny configuration."""
    from espnet2.tasks.enh import separator_choices

    names = set(separator_choices.classes)
    assert names - set(TAPS) - set(UNTAPPED) == set(), "add to TAPS or UNTAPPED of taps.py"
    assert set(TAPS) & set(UNTAPPED) == set()
    assert set(TAPS) == set(SEPARATORS), "add to tests/tiny_separators.py"


def test_the_table_of_the_documentation_lists_every_separator_and_tap():
    """`python docs/separators.py` writes it."""
    from cmkt.espnet_plugin.build import OWN_SEPARATORS
    from cmkt.espnet_plugin.build import SEPARATORS as OF_ESPNET

    text = (REPOSITORY / "docs" / "separators.md").read_text()
    listed = re.findall(r"^(?:\| |- )`(\w+)`", text, re.MULTILINE)
    assert sorted(listed) == sorted([*OF_ESPNET, *OWN_SEPARATORS])
    lines = re.findall(r"^\| (?:`(\w+)`)?.*? \| .*? \| `(\w+)` \| ", text, re.MULTILINE)
    name, found = "", {}
    for separator, tap in lines:
        name = separator or name
        found.setdefault(name, []).append(tap)
    assert found == {name: list(taps) for name, taps in TAPS.items()}


@pytest.mark.parametrize("name", SEPARATORS)
def test_a_tapped_separator_trains_exports_and_equals_stock_espnet(name, tmp_path):
    from espnet2.bin.enh_inference import SeparateSpeech

    model, config = build_with_losses(name)
    model.train()
    before = {key: value.clone() for key, value in model.separator.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(2):
        loss, stats, _ = model(**batch(generator=step))
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(loss).all() and stats["loss_cma"] > 0
        optimizer.step()
    changed = [k for k, v in model.separator.state_dict().items() if not torch.equal(v, before[k])]
    assert changed
    exp = tmp_path / "exp"
    exp.mkdir()
    torch.save(model.state_dict(), exp / "valid.loss_se.best.pth")
    (exp / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(exp)]) == 0
    stock = SeparateSpeech(exp / "export" / "config.yaml", exp / "export" / "model.pth")
    assert all(
        torch.equal(v, model.state_dict()[k]) for k, v in stock.enh_model.state_dict().items()
    )
    noisy = batch()["speech_mix"][0].numpy()
    expected = stock(noisy[None], fs=RATE)[0][0]
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(Enhancer(exp / "export")(noisy), expected)


@pytest.mark.parametrize(("name", "tap"), ALL_TAPS)
def test_the_alignment_trains_all_that_is_below_a_tap_and_nothing_above(name, tap):
    model = build(separator_config(name), tap=tap)
    data = batch()
    speech, lengths = data["speech_mix"], data["speech_mix_lengths"]
    heard = hear(model, speech, lengths)
    acoustic, frames = heard.sequence(model.taps)
    assert frames.tolist()[0] == acoustic.shape[1] and (frames.diff() < 0).all()
    assert acoustic.shape[2] == sum(one.width for one in model.taps) <= 512
    acoustic.retain_grad()
    model.transfer(acoustic, frames, data["linguistic"], data["linguistic_lengths"]).backward()
    assert acoustic.grad[1].abs().sum() == 0, "the utterance without a transcript"
    assert acoustic.grad[0].abs().sum() > 0
    named = dict(model.separator.named_parameters())
    reached = {key for key, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached, "nothing of the separator is trained"
    above = {key for key, p in named.items() if p.grad is None}
    assert above, "no layer is left to use what arrives"
    # Shift what gets no gradient: what is heard does not change, the enhanced speech does.
    model.eval()
    with torch.no_grad():
        acoustic = hear(model, speech, lengths).sequence(model.taps)[0]
        enhanced = model.forward_enhance(speech, lengths, {})[0][0]
        for key in above:
            named[key].add_(0.1 * torch.rand_like(named[key]))
        assert torch.equal(hear(model, speech, lengths).sequence(model.taps)[0], acoustic)
        assert not torch.equal(model.forward_enhance(speech, lengths, {})[0][0], enhanced)
        for key in reached:
            named[key].add_(0.1 * torch.rand_like(named[key]))
        assert not torch.equal(hear(model, speech, lengths).sequence(model.taps)[0], acoustic)


@pytest.mark.parametrize(("name", "tap"), ALL_TAPS)
def test_building_draws_nothing_and_changes_no_weight(name, tap):
    torch.manual_seed(3)
    config = separator_config(name)
    model = build_enhancement_model(config)
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    taps = find_taps(name, model.separator, tap)
    find_listeners(model.encoder, model.separator, taps, None, RATE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.separator.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["dprnn", "dptnet", "svoice", "skim"])
def test_segments_are_merged_to_the_frames_they_were_cut_from(name):
    """Blocks that pass everything on: what is heard is what was cut."""
    config = separator_config(name)
    config["separator_conf"] |= {"seg_overlap": True} if name == "skim" else {}
    model = build(config, tap="middle", pooling={"frames_per_second": None})
    for module in model.separator.modules():
        if type(module).__name__ in ("GroupNorm", "SegLSTM"):  # residual paths: 0
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        if type(module).__name__ == "MulCatBlock":
            nn.init.zeros_(module.block_projection.weight)
            nn.init.zeros_(module.block_projection.bias)
        if type(module).__name__ == "ImprovedTransformerLayer":
            module.forward = lambda x: x
    speech = batch(8008)["speech_mix"]
    cut = {}
    where = model.separator.encoder if name == "svoice" else model.encoder
    hook = where.register_forward_hook(lambda m, x, y: cut.update(y=y))
    with torch.no_grad():
        acoustic = hear(model, speech, torch.tensor([8008] * 3)).sequence(model.taps)[0]
    hook.remove()
    frames = cut["y"].transpose(1, 2) if name == "svoice" else cut["y"][0]
    if name == "dptnet":
        frames = model.separator.enc_LN(frames.relu().transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(acoustic, frames, rtol=1e-4, atol=1e-5)


def test_any_module_can_be_a_tap_and_its_layout_is_found():
    found = {}
    for name, path in (
        ("tcn", "tcn.network.2.0.1.net.0"),
        ("dc_crn", "dc_crn.conv_enc.0"),
        ("dccrn", "encoder.0"),
        ("dccrn", "enhance.0"),
        ("transformer", "transformer.encoders.1.feed_forward.w_1"),
        ("bsrnn", "bsrnn.band_split"),
    ):
        model = build(separator_config(name), tap=path)
        (one,) = model.taps
        found[path] = one.tap.layout
        assert model.hear(batch()["speech_mix"], torch.tensor([8000, 6000, 4000]))[1][0] == 63
    assert list(found.values()) == ["BDT", "BCTF", "BCFT", "TBD", "BTD", "BCTF"]
    # Its input, and a layout of merged axes, which cannot be found.
    path = {"module": "bsrnn.fc_time.0", "side": "input", "layout": "(BF)TC"}
    (one,) = build(separator_config("bsrnn"), tap=path).taps
    assert (one.channels, one.bands) == (16, 3)


def test_layouts_from_shapes():
    assert find_layout((2, 31, 7), (3, 91, 7), (2, 3)) == "BTD"
    assert find_layout((31, 2, 7), (91, 3, 7), (2, 3)) == "TBD"
    assert find_layout((2, 4, 9, 31), (3, 4, 9, 91), (2, 3)) == "BCFT"
    assert find_layout((2, 31, 9, 4), (3, 91, 9, 4), (2, 3)) == "BTDD"
    assert find_layout((18, 31, 7), (27, 91, 7), (2, 3)) is None, "batch and bands are merged"
    assert find_layout((2, 4, 31, 31), (3, 4, 91, 91), (2, 3)) is None, "attention has two"
    assert find_layout((2, 7), (3, 7), (2, 3)) is None


def test_a_complex_activation_is_real_and_imaginary_side_by_side():
    value = torch.randn(2, 5, 3, dtype=torch.complex64)
    frames = to_frames(value, "BTC", 2)
    assert torch.equal(frames[..., 0], torch.cat([value.real, value.imag], -1))
    # DCCRN's recurrent layers give a list: the real part and the imaginary one.
    model = build(separator_config("dccrn"))
    heard = hear(model, batch()["speech_mix"], torch.tensor([8000, 6000, 4000]))
    assert len(heard.stream(model.taps)) == 2
    halves = [part.transpose(0, 1) for part in heard.stream(model.taps)]
    assert torch.equal(heard.frames_at(model.taps[0].tap)[..., 0], torch.cat(halves, -1))


def test_pooling_averages_valid_frames_and_neighbouring_bands():
    x = torch.arange(10.0).view(1, 10, 1).repeat(2, 1, 1)
    pooled, lengths = pool_time(x, torch.tensor([10, 5]), 4)
    assert lengths.tolist() == [3, 2]
    assert pooled[..., 0].tolist() == [[1.5, 5.5, 8.5], [1.5, 4.0, 0.0]]
    bands = pool_bands(torch.arange(6.0).view(1, 1, 1, 6), 3)
    assert bands.flatten().tolist() == [0.5, 2.5, 4.5]
    # Adaptive: parts of unequal size share a band.
    assert pool_bands(torch.arange(5.0).view(1, 1, 1, 5), 2).flatten().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("hop", "rate", "limit", "step"),
    [(128, 16000, 125, 1), (64, 16000, 125, 2), (127, 16000, 125, 2), (64, 8000, 125, 1),
     (160, 16000, 30, 4), (64, 16000, None, 1), (480, 48000, 125, 1)],
)  # fmt: skip
def test_as_few_frames_are_averaged_as_the_limit_asks_for(hop, rate, limit, step):
    config = tiny_config()
    config["encoder_conf"] = config["decoder_conf"] = {"n_fft": 512, "hop_length": hop}
    model = build_enhancement_model(config)
    taps = find_taps("rnn", model.separator)
    (one,) = find_listeners(
        model.encoder, model.separator, taps, {"frames_per_second": limit}, rate
    )
    assert one.step == step
    assert one.rate == pytest.approx(rate / hop, rel=1e-3)


def test_width_is_limited_over_frequency_only():
    for width, bands in ((512, 65), (100, 25), (3, 1), (None, 65)):
        (one,) = build(separator_config("tfgridnetv2"), pooling={"width": width}).taps
        assert (one.channels, one.bands) == (4, bands)
    (one,) = build(separator_config("rnn"), pooling={"width": 2}).taps
    assert one.width == 8, "a layout without frequency is left alone"


def test_a_shorter_utterance_sounds_as_it_does_alone():
    """Padding does not reach the pooled sequence of a causal network with local norms."""
    config = separator_config("tcn")
    config["separator_conf"] |= {"causal": True, "norm_type": "cLN"}
    model = build(config).eval()
    speech = batch()["speech_mix"]
    speech[1, 4000:] = 0
    both, frames = model.hear(speech[:2], torch.tensor([8000, 4000]))
    alone, of_one = model.hear(speech[1:2, :4000], torch.tensor([4000]))
    assert frames[1] == of_one[0] == alone.shape[1]
    torch.testing.assert_close(both[1, : frames[1]], alone[0])


def test_several_taps_stand_side_by_side():
    entries = ["last", "middle", {"module": "blocks.1.intra_norm", "layout": "BTFC"}]
    model, _ = build_with_losses("tfgridnetv2", tap=entries[:2])
    acoustic, _ = model.hear(batch()["speech_mix"], torch.tensor([8000, 6000, 4000]))
    assert acoustic.shape[2] == 2 * 4 * 65
    # Each named twice is heard once.
    assert len(build(separator_config("rnn"), tap=["auto", "last", "rnn"]).taps) == 1
    loss, stats, _ = model(**batch())
    loss.backward()
    assert 0 < stats["loss_cma"] < 2
    with pytest.raises(CmktError, match="differ in their numbers of frames"):
        build(separator_config("tfgridnetv2"), tap=entries, pooling={"frames_per_second": None})


def test_the_gradients_of_both_losses_are_compared_where_the_stream_is():
    model = build_with_losses("tcn")[0].eval()
    loss, stats, _ = model(**batch())
    assert 0 < stats["gradient_share"] < 1


@pytest.mark.parametrize(
    ("name", "tap"),
    [("tcn", "last"), ("transformer", "middle"), ("conformer", "middle"), ("tfgridnetv2", "last"),
     ("dc_crn", "last"), ("uses", "last"), ("gtcrn", "before_last")],
)  # fmt: skip
def test_feedback_is_added_to_the_stream(name, tap, monkeypatch):
    monkeypatch.setattr("cmkt.espnet_plugin.feedback.FEEDBACK_SHARE", 9.0)  # of tiny models
    data = batch()
    speech, lengths = data["speech_mix"], data["speech_mix_lengths"]
    plain = build(separator_config(name), tap=tap).eval()
    model = build(separator_config(name), tap=tap, feedback={"width": 2}).eval()
    assert model.taps[0].width == 2
    with torch.no_grad():
        expected, start = (m.forward_enhance(speech, lengths, {})[0][0] for m in (plain, model))
        assert torch.equal(expected, start)
        nn.init.ones_(model.separator.feedback.up.bias)
        assert not torch.equal(model.forward_enhance(speech, lengths, {})[0][0], expected)
    # The adapter sees the frames in the order in which the alignment would hear them.
    (one,) = plain.taps
    inner = hear(plain, speech, lengths).frames_at(one.tap).flatten(2)
    frames = hear(model, speech, lengths).frames_at(model.stream[0].tap).flatten(2)
    torch.testing.assert_close(frames, inner)


@pytest.mark.parametrize(
    ("name", "tap"), [("dprnn", "last"), ("dccrn", "last"), ("skim", "middle")]
)
def test_feedback_refuses_a_stream_that_it_cannot_be_added_to(name, tap):
    with pytest.raises(CmktError, match="feedback: cannot be added to the"):
        build(separator_config(name), tap=tap, feedback={"width": 1})


ERRORS = {
    "a name nearby": ("rnn", "frist", "the nearest are first"),
    "a path nearby": ("rnn", "rnn.nbrn.after.0", "rnn.nbrnn.after.0"),
    "a path with the same end": ("tcn", "network.1", "tcn.network.1"),
    "no path": ("rnn", "", "no tap or module ''"),
    "merged axes": ("bsrnn", "bsrnn.fc_time.0", "has no time axis"),
    "and what has one": ("bsrnn", "bsrnn.fc_time.0", "bsrnn.band_split"),
    "never called": ("tcn", "tcn.network", "no tensor passes there"),
    "wrong layout": ("rnn", {"module": "rnn", "layout": "BDT"}, "is not BDT"),
    "wrong number of axes": ("rnn", {"module": "rnn", "layout": "BCTF"}, "is not BCTF"),
    "no layout": ("rnn", {"module": "rnn", "layout": "BD"}, "'BD' is none"),
    "segments": ("dprnn", {"module": "dprnn.output", "layout": "BCKS"}, "only for the taps"),
    "wrong side": ("rnn", {"module": "rnn", "side": "left"}, "input, output"),
    "unknown key": ("rnn", {"module": "rnn", "place": "input"}, "unknown key place"),
    "no module": ("rnn", {"side": "input"}, "needs `module`"),
    "wrong type": ("rnn", 3, "must be a name, a mapping or a list"),
    "wrong type in a list": ("rnn", ["first", 3], "an entry must be a name or a mapping"),
    "nothing below": ("rnn", {"module": "rnn", "side": "input"}, "nothing that is trained"),
    "clustering": ("dpcl", "auto", "mask is 1 everywhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_a_tap_that_cannot_work_is_one_line_that_says_what_can(case):
    name, tap, words = ERRORS[case]
    config = separator_config(name if name in SEPARATORS else "rnn")
    if name not in SEPARATORS:
        config |= {"separator": name, "separator_conf": {"layer": 1, "unit": 8, "num_spk": 1}}
    with pytest.raises(CmktError) as error:
        build(config, tap=tap)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pooling", "words"),
    [({"frames_per_second": 0}, "pooling.frames_per_second"), ({"width": 1.5}, "pooling.width"),
     ({"size": 1}, "pooling: unknown key size"), (3, "pooling must be a mapping")],
)  # fmt: skip
def test_wrong_pooling_is_refused(pooling, words):
    with pytest.raises(CmktError, match=words):
        build(separator_config("rnn"), pooling=pooling)
