"""`cmkt score` and `cmkt report` on small files: every failure named, numbers as scored."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from cmkt.cli import main
from cmkt.evaluate.results import baseline_of, split_tag
from cmkt.evaluate.score import Score, read_scores, snr_groups, write_scores
from cmkt.stage import MARKER

FS = 16000
UTTERANCES = ["a", "b", "c", "d"]


def speech_like(seed):
    time = np.arange(FS) / FS
    noise = np.random.default_rng(seed).standard_normal(FS)
    return 0.1 * noise * np.sin(2 * np.pi * 2 * time) ** 2


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A reference directory and an enhanced folder of four utterances at two SNRs."""
    monkeypatch.chdir(tmp_path)
    for folder, name, gain in (("ref", "spk1.scp", 0), ("enh", "wav.scp", 0.2)):
        (tmp_path / folder).mkdir()
        lines = []
        for i, utterance in enumerate(UTTERANCES):
            audio = speech_like(i) + gain * speech_like(100 + i)
            soundfile.write(f"{folder}/{utterance}.wav", audio, FS, "FLOAT")
            lines.append(f"{utterance} {folder}/{utterance}.wav\n")
        (tmp_path / folder / name).write_text("".join(lines))
    (tmp_path / "ref" / "utt2snr").write_text("a -5.0\nb -5.0\nc 0.0\nd 0.0\n")
    return tmp_path


def score(*more):
    words = "score --enhanced enh/wav.scp --reference_dir ref --output_dir exp/x/scores/test"
    return main([*words.split(), "--nj", "2", *more])


def summary():
    with open("exp/x/scores/test/summary.json") as stream:
        return json.load(stream)


def test_scores_every_utterance_and_metric(corpus):
    assert score() == 0
    rows = read_scores(corpus / "exp/x/scores/test/utterances.tsv")
    assert len(rows) == 4 * 5
    assert all(row.value is not None and not row.failure for row in rows)
    snr = [row.value for row in rows if row.metric == "snr"]
    result = summary()
    assert result["n_utterances"] == 4 and result["failures"] == []
    assert result["metrics"]["snr"]["mean"] == pytest.approx(np.mean(snr), abs=1e-5)
    assert result["per_snr"]["-5"]["snr"]["mean"] == pytest.approx(np.mean(snr[:2]), abs=1e-5)
    assert list(result["per_snr"]) == ["-5", "0"]
    # Noise at a gain of 0.2 lies 14 dB below speech of the same level.
    assert result["metrics"]["snr"]["low"] < 14 < result["metrics"]["snr"]["high"] + 0.5


def test_result_does_not_depend_on_the_number_of_jobs(corpus):
    score("--nj", "1", "--metrics", "si_snr,stoi")
    first = (corpus / "exp/x/scores/test/utterances.tsv").read_bytes()
    main(
        "score --enhanced enh/wav.scp --reference_dir ref --output_dir exp/y/scores/test "
        "--metrics si_snr,stoi --nj 3".split()
    )
    assert (corpus / "exp/y/scores/test/utterances.tsv").read_bytes() == first


def break_missing(corpus):
    (corpus / "enh" / "b.wav").unlink()


def break_unlisted(corpus):
    lines = (corpus / "enh" / "wav.scp").read_text().splitlines(keepends=True)
    (corpus / "enh" / "wav.scp").write_text("".join(x for x in lines if not x.startswith("b ")))


def break_length(corpus):
    soundfile.write(corpus / "enh" / "b.wav", speech_like(1)[:-1], FS)


def break_rate(corpus):
    soundfile.write(corpus / "enh" / "b.wav", speech_like(1), 8000)


def break_audio(corpus):
    (corpus / "enh" / "b.wav").write_bytes(b"not audio\tat all\n")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (break_missing, "no such audio file"),
        (break_unlisted, "missing in the list"),
        (break_length, "15999 samples, the reference 16000"),
        (break_rate, "8000 Hz, the reference 16000 Hz"),
        (break_audio, "not readable as audio"),
    ],
)
def test_a_bad_output_is_named_counted_and_left_out(corpus, capsys, damage, reason):
    damage(corpus)
    assert score("--metrics", "snr,stoi") == 0
    rows = read_scores(corpus / "exp/x/scores/test/utterances.tsv")
    bad = [row for row in rows if row.utterance == "b"]
    assert [row.value for row in bad] == [None, None]
    assert all(reason in row.failure for row in bad)
    assert summary()["metrics"]["stoi"]["failures"] == 1
    assert summary()["metrics"]["stoi"]["n"] == 3
    assert len(summary()["failures"]) == 2
    warning = capsys.readouterr().err
    assert "1 of 4 utterances" in warning and reason in warning


def test_only_the_metric_that_fails_is_left_out(corpus):
    soundfile.write(corpus / "enh" / "b.wav", np.zeros(FS), FS)
    assert score("--metrics", "snr,si_snr") == 0
    assert summary()["metrics"]["snr"]["n"] == 4
    assert summary()["metrics"]["si_snr"]["n"] == 3


def test_nothing_scored_is_an_error_and_writes_nothing(corpus, capsys):
    for utterance in UTTERANCES:
        (corpus / "enh" / f"{utterance}.wav").unlink()
    assert score() == 1
    assert "nothing could be scored" in capsys.readouterr().err
    assert not (corpus / "exp").exists()


def test_second_run_does_nothing_and_a_change_redoes_it(corpus):
    score("--metrics", "snr")
    marker = corpus / "exp/x/scores/test" / MARKER
    first = marker.stat().st_mtime_ns
    score("--metrics", "snr")
    assert marker.stat().st_mtime_ns == first
    soundfile.write(corpus / "enh" / "b.wav", speech_like(1), FS, "FLOAT")  # now perfect
    before = summary()["metrics"]["snr"]["mean"]
    score("--metrics", "snr")
    assert summary()["metrics"]["snr"]["mean"] > before + 10
    score("--metrics", "stoi")
    assert list(summary()["metrics"]) == ["stoi"]


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("enh/wav.scp", "a enh/a.wav\nz enh/a.wav\n", "enh/wav.scp:2: unknown utterance z"),
        ("enh/wav.scp", "a cat enh/a.wav |\n", "enh/wav.scp:1: a pipe"),
        ("ref/spk1.scp", "a ref/none.wav\n", "ref/spk1.scp:1: no such reference audio"),
        ("ref/utt2snr", "a -5\nb low\n", "ref/utt2snr:2: the SNR of b is not a number"),
    ],
)
def test_bad_lists_name_file_and_line(corpus, capsys, file, text, message):
    (corpus / file).write_text(text)
    assert score() == 1
    assert message in capsys.readouterr().err


def test_unknown_metric_is_an_error(corpus, capsys):
    assert score("--metrics", "pesq,mos") == 1
    assert "no such metric: 'mos'" in capsys.readouterr().err


def test_another_rate_is_scored_and_said(corpus):
    for folder, offset in (("ref", 0), ("enh", 0)):
        for i, utterance in enumerate(UTTERANCES):
            soundfile.write(f"{folder}/{utterance}.wav", speech_like(i + offset), 8000)
    score("--metrics", "pesq")
    assert summary()["metrics"]["pesq"]["n"] == 4
    assert "8000 Hz" in summary()["notes"][0]


def test_scoring_works_without_transformers(corpus):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from cmkt.cli import main\n"
        "sys.exit(main('score --enhanced enh/wav.scp --reference_dir ref "
        "--output_dir exp/x/scores/test'.split()) or main(['report']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert summary()["metrics"]["si_snr"]["n"] == 4


def test_snr_groups():
    assert snr_groups({"a": "-5.0", "b": "10", "c": ""}) == {"a": "-5", "b": "10"}
    many = {str(i): f"{i - 7.3:.1f}" for i in range(16)}
    assert set(snr_groups(many).values()) == {"-5", "0", "5", "10"}


# ---- report


def test_system_names():
    assert split_tag("blstm_cmkt_minilm_seed12") == ("blstm_cmkt_minilm", 12)
    assert split_tag("noisy") == ("noisy", None)
    systems = {"noisy": False, "blstm": False, "blstm_big": False, "blstm_big_cmkt": True}
    assert baseline_of("blstm_big_cmkt", systems) == "blstm_big"
    assert baseline_of("blstm_cmkt", systems) == "blstm"
    assert baseline_of("blstmx_cmkt", systems) is None
    systems = {"blstm": False, "blstm_cmkt": True, "blstm_cmkt_minilm": True}
    assert baseline_of("blstm_cmkt_minilm", systems) == "blstm"


def write_system(tag, offset, transfer=None, missing=()):
    """Scores of 20 utterances at two SNRs, `offset` above a common pattern."""
    folder = Path(f"exp/{tag}/scores/test")
    folder.mkdir(parents=True, exist_ok=True)
    scores = []
    for i in range(20):
        for metric, unit in (("pesq", 0.1), ("si_snr", 1.0)):
            value = None if f"u{i}" in missing else unit * (i + offset)
            failure = "the output is silent" if value is None else ""
            scores.append(Score(f"u{i}", str(-5 + 5 * (i % 2)), metric, value, failure))
    write_scores(folder / "utterances.tsv", scores)
    (folder / MARKER).write_text("{}")
    if transfer is not None:
        Path(f"exp/{tag}/config.yaml").write_text(yaml.safe_dump({"transfer": transfer}))


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_system("noisy", 0)
    for seed in (0, 1):
        write_system(f"blstm_cmkt_minilm_seed{seed}", 3, "cmkt")
        write_system(f"blstm_seed{seed}", 1, "none", missing=("u4",) if seed else ())
    return tmp_path


def rows_of(text, first):
    return [line for line in text.splitlines() if line.startswith(f"| {first} |")]


def test_report_tables_order_and_numbers(experiments, capsys):
    assert main(["report", "--command", "./run.sh --seeds '0 1'"]) == 0
    text = (experiments / "RESULTS.md").read_text()
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names[:5] == ["system", "---", "noisy", "blstm", "blstm_cmkt_minilm"]
    noisy, baseline, ours = (
        rows_of(text, name)[0].split("|")[1:-1] for name in ("noisy", "blstm", "blstm_cmkt_minilm")
    )
    assert noisy[2].strip().startswith("9.50 [")
    assert [cell.strip() for cell in noisy[3:]] == ["20", "0", "-"]
    assert [cell.strip() for cell in ours[3:]] == ["20", "0", "0, 1"]
    # u4 failed for one seed: named, counted, and left out of the mean of both.
    assert [cell.strip() for cell in baseline[3:]] == ["20", "1", "0, 1"]
    assert baseline[2].strip().startswith(f"{(sum(range(1, 21)) - 5) / 19:.2f} [")
    assert "blstm_seed1: u4: the output is silent" in text
    assert "### test at -5 dB SNR" in text and "### test at 0 dB SNR" in text
    assert "./run.sh --seeds '0 1'" in text
    assert "not in a git tree" in text
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:5]] == list(
        ("system", "noisy", "blstm", "blstm_cmkt_minilm")
    )
    assert "9.50" in shown[2]


def test_report_paired_difference(experiments):
    main(["report"])
    text = (experiments / "RESULTS.md").read_text()
    row = rows_of(text, "blstm_cmkt_minilm - blstm")[0].split("|")[1:-1]
    # Every pair differs by 2, so the interval is a point although utterances spread widely.
    assert [cell.strip() for cell in row[1:]] == [
        "all",
        "+0.20 [+0.20, +0.20]",
        "+2.00 [+2.00, +2.00]",
        "19",
        "0, 1",
    ]


def test_report_compares_with_the_control_of_the_same_training(experiments):
    """A gain of 2 over the baseline, of which the shuffled control has 1.5: 0.5 by the text."""
    for seed in (0, 1):
        write_system(f"blstm_cmkt_minilm_shuffled_seed{seed}", 2.5, "cmkt")
        write_system(f"blstm_cmkt_other_seed{seed}", 0, "cmkt")
        write_system(f"blstm_mimic_seed{seed}", 2, "none")
        rival = {"transfer": "none", "criterions": [{"name": "l1_fd"}, {"name": "mimic"}]}
        Path(f"exp/blstm_mimic_seed{seed}/config.yaml").write_text(yaml.safe_dump(rival))
    assert main(["report"]) == 0
    text = (experiments / "RESULTS.md").read_text()
    row = rows_of(text, "blstm_cmkt_minilm - blstm_cmkt_minilm_shuffled")[0]
    assert "+0.50 [" in row.split("|")[4]
    assert not rows_of(text, "blstm_cmkt_other - blstm_cmkt_minilm_shuffled")
    assert len(rows_of(text, "blstm_cmkt_minilm_shuffled - blstm")) == 3  # all, -5 and 0 dB
    assert len(rows_of(text, "blstm_mimic - blstm")) == 3  # a rival is compared, and no baseline


def test_report_says_when_a_difference_includes_zero(experiments):
    for seed in (0, 1):
        write_system(f"blstm_cmkt_minilm_seed{seed}", 1 + (-1) ** seed, "cmkt")
    main(["report"])
    text = (experiments / "RESULTS.md").read_text()
    row = rows_of(text, "blstm_cmkt_minilm - blstm")[0]
    assert row.count("includes 0") == 2


def test_report_without_a_common_seed_compares_nothing(experiments):
    for seed in (0, 1):
        (experiments / f"exp/blstm_seed{seed}").rename(f"exp/blstm_seed{seed + 7}")
    main(["report"])
    text = (experiments / "RESULTS.md").read_text()
    assert "blstm_cmkt_minilm and blstm share no seed: not compared." in text


def test_report_without_scores_names_the_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 1
    assert "run stage 8" in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()


def test_report_ignores_unfinished_scores(experiments):
    (experiments / "exp/noisy/scores/test" / MARKER).unlink()
    main(["report"])
    assert not rows_of((experiments / "RESULTS.md").read_text(), "noisy")


def save_checkpoint(tag, stats):
    torch = pytest.importorskip("torch")
    reporter = {"epoch": len(stats), "stats": stats}
    torch.save({"model": {}, "reporter": reporter}, f"exp/{tag}/checkpoint.pth")


def test_report_training_diagnostics_and_curves(experiments):
    # The time as ESPnet 202511 pickles it and as 202611 does.
    for time in (datetime.timedelta(seconds=1800), {"__timedelta_seconds__": 1800.0}):
        train = {"loss_se": np.float64(0.3), "time": time, "total_count": 4}
        valid = {
            "loss_se": 0.2,
            "cos_matched": 0.7,
            "cos_mismatched": 0.6,
            "transfer_gap": 0.1,
            "time": time,
            "total_count": 4,
        }
        stats = {1: {"train": train, "valid": valid}, 2: {"train": train, "valid": valid}}
        save_checkpoint("blstm_cmkt_minilm_seed0", stats)
        main(["report"])
        text = (experiments / "RESULTS.md").read_text()
        row = [c.strip() for c in rows_of(text, "blstm_cmkt_minilm_seed0")[0].split("|")[2:-1]]
        assert row == ["2", "2:00:00", "0.2000", "0.7000", "0.6000", "0.1000"]
        assert "No checkpoint.pth with a finished epoch: blstm_seed0, blstm_seed1" in text
        assert "(exp/report/training_curves.png)" in text
        assert (experiments / "exp/report/training_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_report_is_reproducible(experiments):
    main(["report"])
    first = (experiments / "RESULTS.md").read_bytes()
    main(["report"])
    assert (experiments / "RESULTS.md").read_bytes() == first


def test_attention_map_is_drawn_and_checked(tmp_path):
    from cmkt.evaluate.plots import attention_map

    weights = np.random.default_rng(0).dirichlet(np.ones(80), size=3)
    attention_map(weights, ["cost", "$", "5$_x"], 1.6, tmp_path / "plots" / "a.png")
    assert (tmp_path / "plots" / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="2 tokens for attention"):
        attention_map(weights, ["a", "b"], 1.6, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
