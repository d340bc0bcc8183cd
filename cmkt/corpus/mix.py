"""Mix clean speech with noise, or copy data that is already paired.

Reads a Kaldi data directory and writes another one: wav.scp (the mixtures), spk1.scp (the
speech in them), text, utt2spk, spk2utt, utt2snr, utt2noise, 16-bit wav files in audio/ and
spk1/, and, if there were any, `skipped` (silent speech or noise, with the reason).

A mixture depends on --seed and the utterance id alone, not on --nj or the other utterances.
The SNR is the active speech level (ITU-T P.56: pauses do not count) over the level of the
noise. Where a mixture would clip, mixture and reference are scaled together.

If the data directory holds spk1.scp, it is paired: input and reference must have equal
rates and lengths, are converted to --fs and copied, and --snr and --noise_dir play no part.

--snr takes
  low:high     one value per utterance, uniform in this range
  a,b,c        one of these values per utterance
  each:a,b,c   every utterance at every value with the same noise; ids end in _snr<value>
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cmkt.corpus.audio import read_audio
from cmkt.corpus.datadir import DataDirectory, read_table, write_table
from cmkt.corpus.level import is_silent, mix_at_snr
from cmkt.corpus.noise import SPLITS, list_noise, read_stretch
from cmkt.corpus.source import Source, check_pair
from cmkt.errors import CmktError
from cmkt.parallel import journaled_map, parallel_map, read_journal
from cmkt.stage import MARKER, Stage, atomic_file

SNR_LIMIT = 40.0  # dB; beyond, 16 bits cannot hold the weaker part to 0.1 dB
JOURNAL = ".mixed.jsonl"


@dataclass(frozen=True)
class SnrPlan:
    """How SNRs are chosen; see the help of --snr for the forms that `parse` takes.

    Args:
        kind: `range`, `choice` or `each`.
        values: in dB; the two ends of a range.
    """

    kind: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "SnrPlan":
        """Read the value of --snr."""
        kind = "each" if text.startswith("each:") else "range" if ":" in text else "choice"
        numbers = text.removeprefix("each:").split(":" if kind == "range" else ",")
        try:
            values = tuple(float(number) for number in numbers)
        except ValueError:
            values = ()
        if (
            not values
            or not all(abs(value) <= SNR_LIMIT for value in values)
            or len(set(values)) != len(values)
            or (kind == "range" and (len(values) != 2 or values[0] > values[1]))
        ):
            raise CmktError(
                f"--snr {text}: want low:high, a,b,c or each:a,b,c",
                remedy=f"different values in dB from {-SNR_LIMIT:g} to {SNR_LIMIT:g}",
            )
        return cls(kind, values)

    def draw(self, rng: np.random.Generator) -> list[float]:
        """Return the SNRs of one utterance, in dB."""
        if self.kind == "range":
            return [round(rng.uniform(*self.values), 2)]
        if self.kind == "choice":
            return [self.values[rng.integers(len(self.values))]]
        return list(self.values)


@dataclass(frozen=True)
class Mixer:
    """Makes the mixtures of one utterance at a time; see the module's text.

    Args:
        folder: where audio/ and spk1/ lie.
        noise: {name: file}; empty for paired data.
        plan: SNRs.
        seed: with the utterance id, all that the draw depends on.
        fs: output sampling rate in Hz.
        channel: which channel of multi-channel files.
    """

    folder: Path
    noise: dict[str, Path]
    plan: SnrPlan
    seed: int
    fs: int
    channel: int

    def __call__(self, pair: tuple[Source, Source | None]) -> dict:
        """Write one utterance.

        Args:
            pair: the input, and its reference if the data is paired.

        Returns:
            `utterance`; `mixtures`: (id, SNR in dB, noise name) of each one written;
            `skipped`: {what was passed over: why}.
        """
        source, reference = pair
        if reference is not None:
            return self._copy(source, reference)
        name = source.name
        result = {"utterance": name, "mixtures": [], "skipped": {}}
        speech = self._converted(*source.read(self.channel))
        if is_silent(speech, self.fs):
            result["skipped"][name] = "silent speech"
            return result
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "big"))
        snrs = self.plan.draw(rng)
        noise_name, noise = self._draw_noise(rng, len(speech), result["skipped"])
        if noise is None:
            result["skipped"][name] = "found only silence in the noise"
            return result
        for snr in snrs:
            key = f"{name}_snr{snr:g}" if self.plan.kind == "each" else name
            self._write(key, *mix_at_snr(speech, noise, snr, self.fs))
            result["mixtures"].append((key, snr, noise_name))
        return result

    def _draw_noise(self, rng, length: int, skipped: dict) -> tuple[str | None, np.ndarray | None]:
        names = list(self.noise)
        for index in rng.permutation(len(names)):
            name, position = names[index], rng.random()
            path = self.noise[name]
            noise = read_stretch(path, length, self.fs, position, self.channel)
            if not is_silent(noise, self.fs):
                return name, noise
            channel = self.channel if soundfile.info(str(path)).channels > 1 else 0
            whole, rate = read_audio(path, None, channel)
            if is_silent(whole, rate):
                skipped[name] = "silent noise"
        return None, None

    def _copy(self, source: Source, reference: Source) -> dict:
        audio, rate = source.read(self.channel)
        clean, clean_rate = reference.read(self.channel)
        check_pair(reference, (len(audio), rate), (len(clean), clean_rate))
        audio, clean = self._converted(audio, rate), self._converted(clean, rate)
        # Only conversion of the rate can take a file beyond full scale.
        peak = max(np.abs(audio).max(), np.abs(clean).max(), 1.0)
        self._write(source.name, audio / peak, clean / peak)
        return {
            "utterance": source.name,
            "mixtures": [(source.name, None, None)],
            "skipped": {},
        }

    def _converted(self, audio: np.ndarray, rate: int) -> np.ndarray:
        return audio if rate == self.fs else soxr.resample(audio, rate, self.fs)

    def _write(self, key: str, mixture: np.ndarray, speech: np.ndarray) -> None:
        for folder, samples in (("audio", mixture), ("spk1", speech)):
            integers = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
            # Through memory: libsndfile would hide that the device is full.
            encoded = io.BytesIO()
            soundfile.write(encoded, integers, self.fs, format="WAV", subtype="PCM_16")
            with atomic_file(self.folder / folder / f"{key}.wav", "wb") as stream:
                stream.write(encoded.getvalue())


def _sources(table: dict[str, str], path: Path) -> list[Source]:
    return [
        Source(key, value, str(path), line) for line, (key, value) in enumerate(table.items(), 1)
    ]


def _check_audio(pairs: list, noise: list[Source], nj: int) -> None:
    """Read all headers before any long work."""
    flat = [source for pair in pairs for source in pair if source is not None] + noise
    forms = dict(zip(flat, parallel_map(Source.check, flat, nj, "check audio"), strict=True))
    for source, reference in pairs:
        if "/" in source.name:
            raise source.error("an utterance id cannot hold a slash (rename it in all tables)")
        if reference is not None and forms[source] and forms[reference]:
            check_pair(reference, forms[source], forms[reference])


def mix(
    data_dir: str | Path,
    output_dir: str | Path,
    noise_dir: str | Path | None = None,
    noise_split: str | None = None,
    snr: str = "-5:10",
    seed: int = 0,
    fs: int = 16000,
    nj: int = 4,
    channel: int = 0,
    allow_pipes: bool = False,
) -> None:
    """Make `output_dir`; the arguments are the options of `cmkt mix`.

    Raises:
        CmktError: bad input, with file, line and remedy; nothing is left in `output_dir`.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    plan = SnrPlan.parse(snr)
    for name, value, least in (("--fs", fs, 1), ("--nj", nj, 1), ("--channel", channel, 0)):
        if value < least:
            raise CmktError(f"{name} {value}: want at least {least}")
    data = DataDirectory.read(data_dir, allow_pipes)
    paired = data.spk1 is not None
    noise: dict[str, Path] = {}
    if not paired:
        if not noise_dir:
            raise CmktError("clean speech without noise", data_dir, remedy="give --noise_dir")
        noise = list_noise(noise_dir, noise_split)
    extra_names = [n for n in ("utt2snr", "utt2noise") if paired and (data_dir / n).exists()]
    tables = ("wav.scp", "spk1.scp", "utt2spk", "text", MARKER, *extra_names)
    files = [*noise.values(), *map(Path, data.wav.values()), *map(Path, (data.spk1 or {}).values())]
    sizes = [[str(p), p.stat().st_size if p.is_file() else None] for p in files]
    options = {
        "output_dir": str(output_dir),
        "noise": hashlib.sha256(json.dumps(list(noise)).encode()).hexdigest(),
        "sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
        "fs": fs,
        "channel": channel,
    }
    if not paired:
        options |= {"snr": snr, "seed": seed}
    stage = Stage(output_dir, [data_dir / name for name in tables], options)
    if stage.is_done():
        return
    wavs = _sources(data.wav, data_dir / "wav.scp")
    references = [None] * len(wavs)
    if paired:
        references = _sources(data.spk1, data_dir / "spk1.scp")
    pairs = list(zip(wavs, references, strict=True))
    noise_sources = [Source(name, str(path), str(noise_dir), None) for name, path in noise.items()]
    _check_audio(pairs, noise_sources, nj)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with stage.working_directory() as work:
        for folder in ("audio", "spk1"):
            (work / folder).mkdir(exist_ok=True)
        mixer = Mixer(work, noise, plan, seed, fs, channel)
        results = _mix_all(mixer, pairs, nj, work / JOURNAL)
        extra = {name: read_table(data_dir / name) for name in extra_names}
        (work / JOURNAL).unlink()
        for left_by_a_killed_job in work.glob("*/.*.tmp"):
            left_by_a_killed_job.unlink()
        _write_tables(work, output_dir, data, results, extra)


def _mix_all(mixer: Mixer, pairs: list, nj: int, journal: Path) -> list[dict]:
    known = read_journal(journal)
    todo = [pair for pair in pairs if pair[0].name not in known]
    results = journaled_map(mixer, todo, known, journal, nj, "mix")
    return [results[source.name] for source, _ in pairs]


def _write_tables(
    work: Path, output_dir: Path, data: DataDirectory, results: Iterable[dict], extra: dict
) -> None:
    made = DataDirectory({}, {}, {})
    snrs, noises, skipped = {}, {}, {}
    for result in results:
        base = result["utterance"]
        skipped.update(result["skipped"])
        for key, snr, noise_name in result["mixtures"]:
            made.wav[key] = f"{output_dir}/audio/{key}.wav"
            made.spk1[key] = f"{output_dir}/spk1/{key}.wav"
            made.utt2spk[key] = data.utt2spk[base]
            if base in data.text:
                made.text[key] = data.text[base]
            if snr is not None:
                snrs[key], noises[key] = f"{snr:g}", noise_name
    for name, why in sorted(skipped.items()):
        logging.warning("skipped %s: %s", name, why)
    if not made.wav:
        raise CmktError(
            f"nothing left to mix: {len(skipped)} silent files skipped",
            output_dir,
            remedy="check the speech and the noise",
        )
    if skipped:
        write_table(work / "skipped", skipped)
    made.extra = {"utt2snr": snrs, "utt2noise": noises} if snrs else extra
    made.write(work)


def add_arguments(parser) -> None:
    """Add the options of `cmkt mix`."""
    # A value such as -5:10 is no option, though argparse takes only plain numbers for values.
    parser._negative_number_matcher = re.compile(r"^-\.?\d")
    parser.add_argument("--data_dir", required=True, help="Kaldi data directory to read")
    parser.add_argument("--output_dir", required=True, help="Kaldi data directory to make")
    parser.add_argument(
        "--noise_dir", help="any tree of wav, flac or ogg, or a wav.scp (not for paired data)"
    )
    parser.add_argument(
        "--noise_split",
        choices=SPLITS,
        help="use only this part of the noise: by folders named train and test (tr, cv, tt, ...) "
        "at the top of the tree, else by a hash of the file name, 70/10/20 %% (default: all)",
    )
    parser.add_argument("--snr", default="-5:10", help="in dB, see above (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument(
        "--fs", type=int, default=16000, help="output sampling rate in Hz (default %(default)s)"
    )
    parser.add_argument("--nj", type=int, default=4, help="parallel jobs (default %(default)s)")
    parser.add_argument(
        "--channel",
        type=int,
        default=0,
        help="which channel of multi-channel files, from 0 (default %(default)s)",
    )
    parser.add_argument(
        "--allow_pipes",
        action="store_true",
        help="run the commands in a wav.scp that holds pipes; only for files you trust",
    )


def run(args) -> None:
    """Run `cmkt mix` with parsed arguments."""
    mix(**vars(args))
