"""`cmkt transcribe`: real pocketsphinx, and tiny random Whisper, Wav2Vec2 and ESPnet models."""

import importlib.util
import json
import os
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import yaml

from cmkt.cli import main
from cmkt.corpus.datadir import DataDirectory, read_table
from cmkt.errors import CmktError
from cmkt.linguistic.recognisers import PocketSphinx, RecogniserChoice
from cmkt.linguistic.transcribe import JOURNAL
from cmkt.linguistic.word_errors import count_errors

needs_pocketsphinx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pocketsphinx", "espeakng_loader"))),
    reason="cmkt[asr,mini] is not installed",
)
FS = 16000
MOSTLY_WRONG = 0.8  # word error rate; of real speech it gets 0.6, of this synthesiser's too
SENTENCES = {
    "a1": "MY BROTHER LIVES IN A SMALL HOUSE NEAR THE RIVER",
    "a2": "PLEASE OPEN THE WINDOW AND CLOSE THE DOOR",
    "b1": "WE HAVE NO TIME TO LOSE",
    "b2": "THE OLD MAN WENT HOME",
}


def transcribe(data: Path, output: Path, *options: str) -> int:
    """Run the command with two processes."""
    command = ["transcribe", "--data_dir", str(data), "--output_dir", str(output), "--nj", "2"]
    return main([*command, *options])


def results(folder: Path) -> dict[str, bytes]:
    """Return all that a finished transcription holds."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_data(folder: Path, audio: dict[str, np.ndarray], text: dict[str, str], fs=FS) -> Path:
    """Make a clean-only data directory of samples {utterance: (N,)}."""
    folder.mkdir()
    wav = {key: str(folder / f"{key}.wav") for key in audio}
    for key, samples in audio.items():
        soundfile.write(wav[key], samples, fs, subtype="PCM_16")
    DataDirectory(wav, {key: key[0] for key in wav}, None, text).write(folder)
    return folder


@pytest.fixture(scope="module")
def speech() -> dict[str, np.ndarray]:
    """The sentences, synthesised, (N,) at 16 kHz."""
    path = Path(__file__).resolve().parents[2] / "egs" / "mini" / "local" / "espeak.py"
    spec = importlib.util.spec_from_file_location("espeak_of_the_recipe", path)
    espeak = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = espeak
    spec.loader.exec_module(espeak)
    voice = espeak.Voice("a", "en-us+f1", 160, 50, 50)
    spoken = {key: espeak.synthesise(text.lower(), voice) for key, text in SENTENCES.items()}
    return {key: 0.5 * samples / np.abs(samples).max() for key, samples in spoken.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory, speech) -> Path:
    """Four sentences and a silent file."""
    folder = tmp_path_factory.mktemp("transcribe") / "clean"
    silent = {"d1": np.zeros(FS)}
    return write_data(folder, speech | silent, SENTENCES | {"d1": "NOBODY SAYS THIS"})


@pytest.fixture(scope="module")
def transcribed(data) -> Path:
    """What one process makes of them."""
    output = data.parent / "transcribed"
    assert transcribe(data, output, "--nj", "1") == 0
    return output


@needs_pocketsphinx
def test_speech_is_recognised_and_compared_with_its_transcripts(transcribed):
    text = read_table(transcribed / "text")
    assert text.keys() == SENTENCES.keys()
    meta = yaml.safe_load((transcribed / "meta.yaml").read_text())
    assert (meta["recogniser"], meta["utterances"], meta["skipped"]) == ("pocketsphinx", 5, 1)
    wer = meta["wer"]
    assert wer["rate"] < MOSTLY_WRONG, text
    # What was skipped counts: its three words are deleted.
    assert read_table(transcribed / "skipped") == {"d1": "silent audio"}
    assert read_table(transcribed / "wer")["d1"] == "1.0000 0 3 0 3"
    assert wer["words"] == sum(len(words.split()) for words in SENTENCES.values()) + 3
    wrong = wer["substitutions"] + wer["deletions"] + wer["insertions"]
    assert wer["rate"] == pytest.approx(wrong / wer["words"], abs=1e-4)


@needs_pocketsphinx
def test_a_transcript_depends_on_its_utterance_alone(data, transcribed, speech, tmp_path):
    assert transcribe(data, tmp_path / "parallel", "--nj", "3") == 0
    assert results(tmp_path / "parallel") == results(transcribed)
    recogniser, text = PocketSphinx(), read_table(transcribed / "text")
    # Loud noise first: a running cepstral mean would remember it.
    recogniser(np.random.default_rng(0).normal(0, 0.3, FS).astype(np.float32))
    for key in ("b2", "b1", "b2"):
        stored, _ = soundfile.read(data / f"{key}.wav", dtype="float32")
        assert recogniser(stored) == text[key]


@needs_pocketsphinx
def test_another_sampling_rate_is_converted(speech, tmp_path):
    audio = {key: soxr.resample(speech[key], FS, 44100) for key in ("a1", "a2")}
    text = {key: SENTENCES[key] for key in audio}
    output = tmp_path / "output"
    assert transcribe(write_data(tmp_path / "data", audio, text, 44100), output) == 0
    assert yaml.safe_load((output / "meta.yaml").read_text())["wer"]["rate"] < MOSTLY_WRONG


@needs_pocketsphinx
def test_killed_and_resumed_equals_uninterrupted(data, transcribed, tmp_path):
    output = tmp_path / "output"
    journal = tmp_path / ".output.work" / JOURNAL
    command = [sys.executable, "-m", "cmkt.cli", "transcribe", "--data_dir", str(data)]
    command += ["--output_dir", str(output), "--nj", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not output.exists()
    kept = journal.read_bytes()
    assert 0 < kept.count(b"\n") < 5
    with journal.open("ab") as stream:  # a line that the process was killed in
        stream.write(b'{"utterance": "b2", "dig')
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert results(output) == results(transcribed)
    assert (output / JOURNAL).read_bytes().startswith(kept)


@needs_pocketsphinx
def test_only_new_and_changed_audio_is_recognised_again(speech, tmp_path):
    audio = {key: speech[key] for key in ("b1", "b2")}
    data = write_data(tmp_path / "data", audio, {})
    output = tmp_path / "output"
    assert transcribe(data, output) == 0
    assert "wer" not in yaml.safe_load((output / "meta.yaml").read_text())
    # What an unchanged utterance gets now can only have been taken from here.
    rows = [json.loads(line) for line in (output / JOURNAL).read_text().splitlines()]
    marked = [{**row, "text": f"{row['utterance']} kept"} for row in rows]
    (output / JOURNAL).write_text("".join(json.dumps(row) + "\n" for row in marked))
    before = results(output)
    assert transcribe(data, output) == 0 and results(output) == before
    shutil.rmtree(data)
    write_data(data, audio | {"a1": speech["b2"], "b2": 0.5 * speech["b2"]}, {})
    assert transcribe(data, output) == 0
    text = read_table(output / "text")
    assert text["b1"] == "b1 kept"
    assert text.keys() == {"a1", "b1", "b2"} and "kept" not in text["a1"] + text["b2"]


@needs_pocketsphinx
def test_the_clean_reference_is_recognised_or_the_noisy_input(speech, tmp_path):
    clean = write_data(tmp_path / "clean", {"a1": speech["b1"]}, {})
    other = write_data(tmp_path / "other", {"a1": speech["b2"]}, {})
    (other / "spk1.scp").write_bytes((clean / "wav.scp").read_bytes())
    said = {}
    for name, folder, options in (
        ("clean", other, []),
        ("noisy", other, ["--noisy"]),
        ("reference", clean, []),
    ):
        assert transcribe(folder, tmp_path / f"text_{name}", *options) == 0
        said[name] = read_table(tmp_path / f"text_{name}" / "text")["a1"]
        meta = yaml.safe_load((tmp_path / f"text_{name}" / "meta.yaml").read_text())
        assert meta["noisy"] is bool(options)
    assert said["clean"] == said["reference"] != said["noisy"]


@needs_pocketsphinx
def test_nothing_recognised_at_all_is_an_error(tmp_path, capsys):
    data = write_data(tmp_path / "data", {"a": np.zeros(FS), "b": np.zeros(FS)}, {"a": "HELLO"})
    assert transcribe(data, tmp_path / "output") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(data / "wav.scp") in error and "nothing for all of 2 utterances" in error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recogniser", "kaldi"], "no such recogniser"),
        (["--recogniser", "espnet"], "no such recogniser"),
        (["--recogniser", "espnet:nowhere"], "no such file of an ESPnet recogniser"),
        (["--recogniser", "transformers:./nowhere"], "./nowhere"),
        (["--language", "zh"], "English model only"),
        (["--device", "cuda"], "runs on the CPU"),
        (["--noisy"], "no noisy input"),
        (["--nj", "0"], "--nj 0"),
    ],
)
@needs_pocketsphinx
def test_a_wrong_option_is_named_in_one_line(data, tmp_path, capsys, options, message):
    assert transcribe(data, tmp_path / "output", *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@needs_pocketsphinx
def test_unreadable_audio_and_pipes_are_refused(tmp_path, capsys):
    data = write_data(tmp_path / "data", {"a": np.ones(FS), "b": np.ones(FS)}, {})
    (data / "b.wav").write_bytes(b"no audio")
    assert transcribe(data, tmp_path / "output") == 1
    assert f"{data / 'wav.scp'}:2: b: not readable as audio" in capsys.readouterr().err
    (data / "wav.scp").write_text(f"a {data}/a.wav\nb touch {tmp_path}/run |\n")
    assert transcribe(data, tmp_path / "output") == 1
    assert "a pipe" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_errors_are_counted_as_by_hand():
    references = {"a": "IT'S A FINE DAY", "b": "HELLO", "c": "WE GO", "d": "..."}
    hypotheses = {"a": "It\u2019s, a wine day; today", "b": "hello.", "d": "noise"}
    # One substitution and one insertion; none; two deletions; a reference without a word.
    assert count_errors(references, hypotheses) == (
        "wer",
        {"a": (1, 0, 1, 4), "b": (0, 0, 0, 1), "c": (0, 2, 0, 2)},
    )


def test_mandarin_is_compared_by_character():
    name, errors = count_errors({"a": "今天天气很好"}, {"a": "今天 天汽很好。吗"})
    assert (name, errors) == ("cer", {"a": (1, 0, 1, 6)})


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    """A multilingual Whisper of width 16 with random weights and a vocabulary of bytes."""
    import torch
    import transformers
    from tokenizers import AddedToken, pre_tokenizers

    folder = tmp_path_factory.mktemp("whisper")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = "endoftext startoftranscript en zh translate transcribe startoflm startofprev nospeech"
    special = [f"<|{name}|>" for name in (*names.split(), "notimestamps")]
    times = [f"<|{0.02 * index:.2f}|>" for index in range(1501)]
    ids = {token: index for index, token in enumerate([*letters, *special, *times])}
    tokenizer = transformers.WhisperTokenizer(vocab=ids, merges=[])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token) for token in times])
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in sizes.items()}
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **sizes,
            vocab_size=len(ids),
            d_model=16,
            max_target_positions=32,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
            decoder_start_token_id=start,
        )  # fmt: skip
    )
    with torch.no_grad():  # letters are likelier than times
        model.get_input_embeddings().weight[ids["a"] : ids["z"]] *= 20
    model.generation_config = transformers.GenerationConfig(
        lang_to_id={token: ids[token] for token in ("<|en|>", "<|zh|>")},
        task_to_id={name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        **{"is_multilingual": True, "max_new_tokens": 8, "num_beams": 1},
        **{"pad_token_id": end, "eos_token_id": end, "decoder_start_token_id": start},
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory) -> Path:
    """A Wav2Vec2 of width 16 with random weights and a vocabulary of eight letters."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("wav2vec2")
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGH"]
    (folder / "list.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "list.json")).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8,) * 7, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def long_and_short(tmp_path_factory) -> Path:
    """Coloured noise of 70, 2 and 0.01 seconds; random models hear words in it."""
    generator = np.random.default_rng(0)
    lengths = {"a": 70 * FS, "b": 2 * FS, "c": FS // 100}
    audio = {key: 0.1 * generator.normal(0, 1, length) for key, length in lengths.items()}
    return write_data(tmp_path_factory.mktemp("audio") / "data", audio, {})


def transcribe_with(model: Path, data: Path, output: Path, *options: str) -> dict[str, str]:
    """Return the text that a model of transformers gives."""
    assert transcribe(data, output, "--recogniser", f"transformers:{model}", *options) == 0
    return read_table(output / "text")


def test_whisper_takes_audio_of_any_length(whisper, long_and_short, tmp_path):
    options = ["--language", "zh", "--nj", "1"]
    text = transcribe_with(whisper, long_and_short, tmp_path / "output", *options)
    assert text.keys() == {"a", "b", "c"}
    meta = yaml.safe_load((tmp_path / "output" / "meta.yaml").read_text())
    assert (meta["recogniser"], meta["language"]) == ("transformers", "zh")
    assert len(meta["sha256"]) == 64
    # Short ones alone, without the long one before them.
    recogniser = RecogniserChoice.parse(f"transformers:{whisper}", "zh").load()
    audio, _ = soundfile.read(long_and_short / "b.wav", dtype="float32")
    assert recogniser(audio) == text["b"]


@pytest.mark.slow
def test_a_ctc_model_takes_audio_of_any_length_in_any_process(wav2vec2, long_and_short, tmp_path):
    text = transcribe_with(wav2vec2, long_and_short, tmp_path / "one", "--nj", "1")
    assert len(text["a"]) > 10 * len(text["b"])
    transcribe_with(wav2vec2, long_and_short, tmp_path / "two", "--nj", "2")
    assert results(tmp_path / "two") == results(tmp_path / "one")


def test_a_language_that_whisper_does_not_have_is_refused(whisper):
    choice = RecogniserChoice.parse(f"transformers:{whisper}", "xx")
    with pytest.raises(CmktError, match=r"--language xx.*it has en, zh"):
        choice.load()


def test_an_encoder_without_a_trained_output_layer_is_refused(wav2vec2, tmp_path):
    import transformers

    shutil.copytree(wav2vec2, tmp_path, dirs_exist_ok=True)
    transformers.Wav2Vec2Model.from_pretrained(wav2vec2).save_pretrained(tmp_path)
    with pytest.raises(CmktError, match="not a trained recogniser.*lm_head"):
        RecogniserChoice.parse(f"transformers:{tmp_path}").load()


@pytest.mark.slow
def test_an_espnet_experiment_is_a_recogniser(tmp_path, monkeypatch):
    import torch
    from espnet2.tasks.asr import ASRTask

    # As in a recipe: the paths in config.yaml start from its folder.
    experiment = tmp_path / "recipe" / "exp" / "asr"
    experiment.mkdir(parents=True)
    numbers = {"count": 10, "sum": np.zeros(80), "sum_square": np.full(80, 10.0)}
    np.savez(tmp_path / "recipe" / "exp" / "stats.npz", **numbers)
    sizes = {"attention_heads": 2, "linear_units": 8, "num_blocks": 1}
    config = {
        "token_list": ["<blank>", "<unk>", "<space>", *string.ascii_uppercase, "<sos/eos>"],
        "token_type": "char",
        "frontend_conf": {"fs": "8k", "n_fft": 256, "hop_length": 80},
        "normalize": "global_mvn",
        "normalize_conf": {"stats_file": "exp/stats.npz"},
        "encoder": "transformer",
        "encoder_conf": {"output_size": 8, **sizes},
        "decoder": "transformer",
        "decoder_conf": sizes,
    }
    (tmp_path / "asr.yaml").write_text(yaml.safe_dump(config))
    command = ["--config", str(tmp_path / "asr.yaml"), "--output_dir", str(experiment)]
    args = ASRTask.get_parser().parse_args(command)
    with monkeypatch.context() as context:
        context.chdir(tmp_path / "recipe")
        torch.manual_seed(0)
        model = ASRTask.build_model(args)
    (experiment / "config.yaml").write_text(yaml.safe_dump(vars(args)))
    torch.save({}, experiment / "checkpoint.pth")
    torch.save(model.state_dict(), experiment / "valid.acc.ave_10best.pth")

    choice = RecogniserChoice.parse(f"espnet:{experiment}")
    recogniser = choice.load(threads=1)
    assert recogniser.fs == 8000
    audio = 0.1 * np.random.default_rng(0).normal(0, 1, 8000).astype(np.float32)
    text = recogniser(audio)
    assert text and recogniser(np.zeros(300, np.float32)) == "" and recogniser(audio) == text
    weights = experiment / "valid.acc.ave_10best.pth"
    assert RecogniserChoice.parse(f"espnet:{weights}").load(threads=1)(audio) == text
    # The zoo's layout.
    names = {
        "files": {"asr_model_file": "exp/asr/valid.acc.ave_10best.pth"},
        "yaml_files": {"asr_train_config": "exp/asr/config.yaml"},
    }
    (tmp_path / "recipe" / "meta.yaml").write_text(yaml.safe_dump(names))
    packed = RecogniserChoice.parse(f"espnet:{tmp_path / 'recipe'}")
    assert packed.identity["sha256"] == choice.identity["sha256"]
    assert packed.load(threads=1)(audio) == text
    (tmp_path / "recipe" / "exp" / "stats.npz").unlink()
    with pytest.raises(CmktError, match="names files that are not there: exp/stats.npz"):
        choice.load(threads=1)
