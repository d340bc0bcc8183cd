"""Recognise the speech of a data directory, for corpora without transcripts.

Reads spk1.scp of a Kaldi data directory, the clean reference (wav.scp where there is none), or
wav.scp with --noisy. Writes a Kaldi `text`, as the recogniser spells it, and meta.yaml; `skipped`
names the utterances for which it returned nothing, with the reason; they are not in `text`.

Where the data directory has transcripts, meta.yaml holds the word error rate (upper and lower
case and punctuation do not count; what was skipped counts as deleted), and `wer` lists
`<utterance> <rate> <substitutions> <deletions> <insertions> <words>`. In Mandarin and Japanese
characters are counted instead of words: `cer`.

--recogniser
  pocketsphinx               English, 16 kHz, from the package pocketsphinx (default)
  transformers:<model>       a Whisper-like or CTC model, a folder or a Hugging Face name (the
                             network is used only for one that is not in the cache)
  espnet:<folder>            an experiment folder (config.yaml and valid.*.pth), one of its .pth
                             files, or an unpacked model of the ESPnet model zoo

A transcript depends on the audio and the recogniser alone, not on --nj. An interrupted run goes
on where it ended, and utterances that were added later are the only ones recognised.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soxr
import yaml

from cmkt import __version__
from cmkt.corpus.datadir import DataDirectory, write_table
from cmkt.corpus.level import is_silent
from cmkt.corpus.source import Source
from cmkt.errors import CmktError
from cmkt.linguistic.recognisers import Recogniser, RecogniserChoice
from cmkt.linguistic.word_errors import count_errors
from cmkt.parallel import journaled_map, parallel_map, read_journal
from cmkt.stage import MARKER, Stage, atomic_file

JOURNAL = ".transcribed.jsonl"
SHORTEST = 0.1  # seconds; shorter audio is padded, for some models take no less


@dataclass(frozen=True)
class AudioCheck:
    """Checks an audio file and tells what its transcript depends on.

    Args:
        identity: of the recogniser.
        channel: which channel of multi-channel files.
    """

    identity: dict
    channel: int

    def __call__(self, source: Source) -> tuple[str, int | None]:
        """Return a digest of audio and recogniser, and the rate in Hz; None for a pipe."""
        form = source.check()
        audio = source.value.encode() if source.is_pipe else Path(source.value).read_bytes()
        digest = hashlib.sha256(json.dumps([self.identity, self.channel], sort_keys=True).encode())
        digest.update(audio)
        return digest.hexdigest(), form and form[1]


@dataclass
class Transcriber:
    """Recognises one utterance at a time; loads the recogniser when the first one comes.

    Args:
        choice: the recogniser.
        channel: which channel of multi-channel files.
        threads: of torch; None: as many as it likes.
    """

    choice: RecogniserChoice
    channel: int
    threads: int | None

    @cached_property
    def recogniser(self) -> Recogniser:
        """The loaded recogniser of this process."""
        return self.choice.load(self.threads)

    def __call__(self, item: tuple[Source, str]) -> dict:
        """Return `utterance`, `digest` and `text`, or why there is none: `skipped`.

        Args:
            item: the audio and its digest.
        """
        source, digest = item
        audio, rate = source.read(self.channel)
        result = {"utterance": source.name, "digest": digest}
        # Recognisers hear words in digital silence.
        if is_silent(audio, rate):
            return {**result, "skipped": "silent audio"}
        fs = self.recogniser.fs
        if rate != fs:
            audio = soxr.resample(audio, rate, fs).astype(np.float32)
        audio = np.pad(audio, (0, max(0, round(SHORTEST * fs) - len(audio))))
        try:
            text = " ".join(self.recogniser(audio).split())
        except (RuntimeError, ValueError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise source.error(f"the recogniser failed: {reason}") from error
        return {**result, "text": text} if text else {**result, "skipped": "nothing recognised"}


def transcribe(
    data_dir: str | Path,
    output_dir: str | Path,
    noisy: bool = False,
    recogniser: str = "pocketsphinx",
    language: str | None = None,
    device: str = "cpu",
    nj: int = 4,
    channel: int = 0,
    allow_pipes: bool = False,
) -> None:
    """Make `output_dir`; the arguments are the options of `cmkt transcribe`.

    Raises:
        CmktError: bad input, with file, line and remedy, or a recogniser that returns nothing;
            nothing is changed in `output_dir`.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    for name, value, least in (("--nj", nj, 1), ("--channel", channel, 0)):
        if value < least:
            raise CmktError(f"{name} {value}: want at least {least}")
    data = DataDirectory.read(data_dir, allow_pipes)
    if noisy and data.spk1 is None:
        raise CmktError("clean speech, no noisy input", data_dir, remedy="run stage 2 first")
    choice = RecogniserChoice.parse(recogniser, language, device)
    scp = data_dir / ("spk1.scp" if data.spk1 is not None and not noisy else "wav.scp")
    table = data.spk1 if scp.name == "spk1.scp" else data.wav
    files = map(Path, table.values())
    sizes = [[str(file), file.stat().st_size if file.is_file() else None] for file in files]
    options = {
        **choice.identity,
        "audio": scp.name,
        "channel": channel,
        "sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }
    stage = Stage(output_dir, [scp, data_dir / "text", data_dir / MARKER], options)
    if stage.is_done():
        return
    sources = [Source(*entry, str(scp), line) for line, entry in enumerate(table.items(), 1)]
    checked = list(parallel_map(AudioCheck(choice.identity, channel), sources, nj, "check audio"))
    items = [(source, digest) for source, (digest, _) in zip(sources, checked, strict=True)]
    with stage.working_directory() as work:
        transcriber = Transcriber(choice, channel, 1 if nj > 1 else None)
        old = read_journal(output_dir / JOURNAL) | read_journal(work / JOURNAL)
        results = _transcribe_all(transcriber, items, nj, old, work / JOURNAL)
        texts = {key: r["text"] for key, r in results.items() if "text" in r}
        if not texts:
            raise CmktError(
                f"the recogniser returned nothing for all of {len(results)} utterances",
                scp,
                remedy="is it one of this language and sampling rate? listen to the audio",
            )
        skipped = {key: r["skipped"] for key, r in results.items() if "skipped" in r}
        meta = {
            **choice.identity,
            "noisy": scp.name == "wav.scp" and data.spk1 is not None,
            "audio": scp.name,
            "utterances": len(results),
            "skipped": len(skipped),
            "cmkt_version": __version__,
        }
        for key, why in skipped.items():
            logging.warning("skipped %s: %s", key, why)
        if skipped:
            write_table(work / "skipped", skipped)
        meta |= _compare(data.text, texts, work)
        write_table(work / "text", texts)
        with atomic_file(work / "meta.yaml") as stream:
            yaml.safe_dump(meta, stream, sort_keys=False, allow_unicode=True)


def _transcribe_all(
    transcriber: Transcriber, items: list, nj: int, old: dict[str, dict], journal: Path
) -> dict[str, dict]:
    """Return the result of every utterance; those of the same audio are taken from `old`."""
    known = {
        source.name: old[source.name]
        for source, digest in items
        if old.get(source.name, {}).get("digest") == digest
    }
    todo = [item for item in items if item[0].name not in known]
    # Threads of torch do not survive a fork.
    spawn = transcriber.choice.kind != "pocketsphinx"
    results = journaled_map(transcriber, todo, known, journal, nj, "transcribe", spawn)
    return {source.name: results[source.name] for source, _ in items}


def _compare(references: dict[str, str], texts: dict[str, str], work: Path) -> dict:
    """Write the errors of each utterance; return those of all, for meta.yaml."""
    name, errors = count_errors(references, texts)
    if not errors:
        return {}
    rows = {
        key: f"{sum(row[:3]) / row[3]:.4f} " + " ".join(map(str, row))
        for key, row in errors.items()
    }
    write_table(work / name, rows)
    names = ("substitutions", "deletions", "insertions", "words" if name == "wer" else "characters")
    total = dict(zip(names, map(sum, zip(*errors.values(), strict=True)), strict=True))
    *wrong, size = total.values()
    rate = sum(wrong) / size
    print(f"{name.upper()} {100 * rate:.1f} % of {len(errors)} utterances")
    return {name: {"rate": round(rate, 4), **total, "utterances": len(errors)}}


def add_arguments(parser) -> None:
    """Add the options of `cmkt transcribe`."""
    add = parser.add_argument
    add("--data_dir", required=True, help="Kaldi data directory to read")
    add("--output_dir", required=True, help="folder to make, for example dump/text/asr/train")
    add("--noisy", action="store_true", help="recognise the noisy input, not the clean reference")
    add("--recogniser", default="pocketsphinx", help="see above (default %(default)s)")
    add("--language", help="of the speech, for a Whisper model, for example zh (default: it tells)")
    add("--device", default="cpu", help="torch device, for example cuda (default %(default)s)")
    add("--nj", type=int, default=4, help="processes, a model in each (default %(default)s)")
    add(
        "--channel",
        type=int,
        default=0,
        help="which channel of multi-channel files, from 0 (default %(default)s)",
    )
    add(
        "--allow_pipes",
        action="store_true",
        help="run the commands in a scp that holds pipes; only for files you trust",
    )


def run(args) -> None:
    """Run `cmkt transcribe` with parsed arguments."""
    transcribe(**vars(args))
