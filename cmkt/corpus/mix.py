"""Mix clean speech with noise, or copy data that is already paired.

Reads a Kaldi data directory and writes another one: wav.scp (the mixtures), spk1.scp (the
references), text, utt2spk, spk2utt, utt2snr, utt2noise, noise.scp (the noise files used), utt2room,
16-bit wav files in audio/ and spk1/, ctm (word times) if the data directory has it, and, if there
were any, `skipped` (silent or unreadable speech or noise, with the reason; more than 1 %
unreadable is an error).

A mixture depends on --seed, the utterance id and the noise and rooms there are, not on --nj or,
without babble, the other utterances. The SNR is the active speech level (ITU-T P.56: pauses do not
count), in the room if there is one, over the level of the noise. Where a mixture would clip,
mixture and reference are scaled together.

--babble_share P   with probability P the noise is babble: other speakers of the same directory
--rir_dir DIR      impulse responses (any tree, or that of `cmkt simulate-rooms`); the reference has
                   the early reflections (50 ms) only, or with --rir_reference reverberant all

If the data directory holds spk1.scp, it is paired: input and reference must have equal
rates and lengths, are converted to --fs and copied, and nothing is added to them.

--online makes no mixtures: it converts what is not at --fs yet and lists speech, noise and rooms
for a training that mixes them anew in each epoch (docs/data.md).

--snr takes
  low:high     one value per utterance, uniform in this range
  a,b,c        one of these values per utterance
  each:a,b,c   every utterance at every value with the same noise; ids end in _snr<value>
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from cmkt.corpus.babble import Babble
from cmkt.corpus.datadir import DataDirectory, read_table, write_table
from cmkt.corpus.mixer import Item, Mixer, Rooms, SnrPlan, shard_path
from cmkt.corpus.noise import SPLITS, list_audio
from cmkt.corpus.online import prepare_online
from cmkt.corpus.rooms import REFERENCES
from cmkt.corpus.source import Source, check_pair, refuse_unreadable
from cmkt.corpus.word_times import CTM, copy_word_times
from cmkt.errors import CmktError
from cmkt.parallel import journaled_map, parallel_map, read_journal
from cmkt.stage import MARKER, Stage

JOURNAL = ".mixed.jsonl"


def _sources(table: dict[str, str], path: Path) -> list[Source]:
    return [
        Source(key, value, str(path), line) for line, (key, value) in enumerate(table.items(), 1)
    ]


def _items(data: DataDirectory, folder: Path) -> list[Item]:
    sources = _sources(data.wav, folder / "wav.scp")
    references: list = [None] * len(sources)
    if data.spk1 is not None:
        references = _sources(data.spk1, folder / "spk1.scp")
    pairs = zip(sources, references, strict=True)
    return [Item(source, reference, data.utt2spk[source.name]) for source, reference in pairs]


def _examine(source: Source) -> tuple[tuple[int, int] | None, str]:
    try:
        return source.check(), ""
    except CmktError as error:
        return None, str(error)


def _check_audio(items: list[Item], noise: list[Source], nj: int) -> dict[str, str]:
    """Read all headers before any long work; return {name: error} of what cannot be read."""
    for item in items:
        if "/" in item.source.name:
            raise item.source.error("an utterance id cannot hold a slash (rename it in all tables)")
    sources = [source for i in items for source in (i.source, i.reference) if source is not None]
    bad = {}
    for what, group in (("utterances", sources), ("noise files", noise)):
        found = list(parallel_map(_examine, group, nj, f"check {what}"))
        forms = {source: form for source, (form, _) in zip(group, found, strict=True)}
        wrong = {s.name: error for s, (_, error) in zip(group, found, strict=True) if error}
        refuse_unreadable(wrong, len(group), what)
        bad |= wrong
        for item in items if what == "utterances" else ():
            if item.reference and forms[item.source] and forms[item.reference]:
                check_pair(item.reference, forms[item.source], forms[item.reference])
    return bad


def _refuse_speech_as_noise(noise: dict[str, Path], items: list[Item], noise_dir: object) -> None:
    files = {str(path.resolve()) for path in noise.values()}
    for item in items:
        if str(Path(item.source.value).resolve()) in files:
            raise item.source.error(
                f"is also noise of {noise_dir}: one folder lies in the other "
                "(move the noise out of the speech folder)"
            )


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise CmktError(f"{name} {value}: want a share from 0 to 1")
    return value


def _sizes(files: Iterable[Path]) -> str:
    # `os.path` takes a pipe for a file that is not there, however long it is.
    sizes = [[str(f), os.path.getsize(f) if os.path.isfile(f) else None] for f in files]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


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
    babble_share: float = 0.0,
    babble_talkers: tuple[int, int] = (3, 8),
    rir_dir: str | Path | None = None,
    rir_share: float = 0.5,
    rir_reference: str = "early",
    online: bool = False,
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
    if paired and online:
        raise CmktError("pairs cannot be mixed online", data_dir, remedy="leave out --online")
    noise: dict[str, Path] = {}
    rooms = None
    if not paired:
        if not noise_dir and _share("--babble_share", babble_share) < 1:
            raise CmktError("clean speech without noise", data_dir, remedy="give --noise_dir")
        noise = list_audio(noise_dir, noise_split) if noise_dir else {}
        if rir_dir:
            files = list_audio(rir_dir, noise_split, "impulse response")
            rooms = Rooms(files, _share("--rir_share", rir_share), rir_reference)
    items = _items(data, data_dir)
    extra_names = [n for n in ("utt2snr", "utt2noise") if paired and (data_dir / n).exists()]
    word_times = [CTM] if (data_dir / CTM).exists() else []
    tables = ("wav.scp", "spk1.scp", "utt2spk", "text", MARKER, *extra_names, *word_times)
    speech = [Path(path) for table in (data.wav, data.spk1 or {}) for path in table.values()]
    options = {
        "output_dir": str(output_dir),
        "noise": hashlib.sha256(json.dumps(list(noise)).encode()).hexdigest(),
        "sizes": _sizes([*noise.values(), *speech]),
        "fs": fs,
        "channel": channel,
    }
    if not paired:
        options |= {"online": True} if online else {"snr": snr, "seed": seed}
        if babble_share:
            options["babble"] = [babble_share, *babble_talkers]
        if rooms:
            options["rooms"] = [_sizes(rooms.files.values()), rooms.share, rooms.reference]
    stage = Stage(output_dir, [data_dir / name for name in tables], options)
    if stage.is_done():
        return
    _refuse_speech_as_noise(noise, items, noise_dir)
    noise_sources = [Source(name, str(path), str(noise_dir), None) for name, path in noise.items()]
    bad = _check_audio(items, noise_sources, nj)
    items = [i for i in items if not {i.source.name} & bad.keys()]
    noise = {name: path for name, path in noise.items() if name not in bad}
    babble = None
    if babble_share and not paired:
        sources = [item.source for item in items]
        babble = Babble.of(data.utt2spk, sources, tuple(babble_talkers), babble_share)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with stage.working_directory() as work:
        if online:
            made = prepare_online(work, output_dir, data, items, noise, rooms, fs, channel, nj)
            if word_times:
                copy_word_times(data_dir / CTM, work / CTM, {key: key for key in made.wav})
            return
        for folder in ("audio", "spk1"):
            (work / folder).mkdir(exist_ok=True)
        mixer = Mixer(work, noise, plan, seed, fs, channel, babble, rooms)
        results = _mix_all(mixer, items, nj, work / JOURNAL)
        for what, names in (("utterances", set(data.wav)), ("noise files", set(noise))):
            errors = {n: e for r in results for n, e in r["unreadable"].items() if n in names}
            bad |= errors
            refuse_unreadable(errors, len(names), what)
        extra = {name: read_table(data_dir / name) for name in extra_names}
        (work / JOURNAL).unlink()
        for left_by_a_killed_job in work.glob("*/*/.*.tmp"):
            left_by_a_killed_job.unlink()
        made, skipped = _tables(output_dir, data, results, noise)
        made.extra |= extra
        _write_tables(work, output_dir, made, skipped | bad)
        if word_times:
            origins = {key: r["utterance"] for r in results for key, *_ in r["mixtures"]}
            copy_word_times(data_dir / CTM, work / CTM, origins)


def _mix_all(mixer: Mixer, items: list[Item], nj: int, journal: Path) -> list[dict]:
    known = read_journal(journal)
    todo = [item for item in items if item.source.name not in known]
    results = journaled_map(mixer, todo, known, journal, nj, "mix")
    return [results[item.source.name] for item in items]


def _tables(
    output_dir: Path, data: DataDirectory, results: Iterable[dict], noise: dict[str, Path]
) -> tuple[DataDirectory, dict[str, str]]:
    """Return the tables of the mixtures, and what was skipped and why."""
    made = DataDirectory({}, {}, {})
    tables: dict[str, dict] = {"utt2snr": {}, "utt2noise": {}, "utt2room": {}, "noise.scp": {}}
    skipped: dict[str, str] = {}
    for result in results:
        base = result["utterance"]
        skipped.update(result["skipped"])
        for key, snr, noise_name, room in result["mixtures"]:
            made.wav[key] = f"{output_dir}/{shard_path('audio', key)}"
            made.spk1[key] = f"{output_dir}/{shard_path('spk1', key)}"
            made.utt2spk[key] = data.utt2spk[base]
            if base in data.text:
                made.text[key] = data.text[base]
            if snr is not None:
                tables["utt2snr"][key], tables["utt2noise"][key] = f"{snr:g}", noise_name
            if room is not None:
                tables["utt2room"][key] = room
            if noise_name in noise:
                tables["noise.scp"][noise_name] = str(noise[noise_name].absolute())
    made.extra = {name: table for name, table in tables.items() if table}
    return made, skipped


def _write_tables(work: Path, output_dir: Path, made: DataDirectory, skipped: dict) -> None:
    for name, why in sorted(skipped.items()):
        logging.warning("skipped %s: %s", name, why)
    if not made.wav:
        raise CmktError(
            f"nothing left to mix: {len(skipped)} files skipped",
            output_dir,
            remedy="check the speech and the noise",
        )
    if skipped:
        write_table(work / "skipped", skipped)
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
        "--babble_share",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the utterances whose noise is babble (default %(default)s)",
    )
    parser.add_argument(
        "--babble_talkers",
        type=int,
        nargs=2,
        default=[3, 8],
        metavar=("FEWEST", "MOST"),
        help="that talk at once (default 3 8)",
    )
    parser.add_argument(
        "--rir_dir", help="room impulse responses: a tree or a wav.scp, split as the noise is"
    )
    parser.add_argument(
        "--rir_share",
        type=float,
        default=0.5,
        metavar="P",
        help="share of the utterances that are put into a room (default %(default)s)",
    )
    parser.add_argument(
        "--rir_reference",
        choices=REFERENCES,
        default="early",
        help="what the reference keeps of the room (default %(default)s)",
    )
    parser.add_argument(
        "--online", action="store_true", help="list and convert only; training mixes"
    )
    parser.add_argument(
        "--allow_pipes",
        action="store_true",
        help="run the commands in a wav.scp that holds pipes; only for files you trust",
    )


def run(args) -> None:
    """Run `cmkt mix` with parsed arguments."""
    mix(**vars(args))
