"""Check data directories wholly: tables, every audio file, transcripts, and what sets share.

  cmkt validate data/train data/valid data/test

The first directory is the training set; speakers, audio and noise recordings that another one
shares with it are errors. A directory with spk1.scp is one of mixtures (or noisy/clean pairs),
others hold clean speech. Each audio file is decoded once, to its end. Errors end the command
with status 1, warnings do not; docs/validate.md lists the checks.

--output_dir DIR keeps report.txt, report.json and what was measured of each file: the same command
again decodes nothing, a killed one goes on, and after a change only changed files are decoded.
--fix OUT writes a copy of the (one) directory, sorted and without the utterances that have
errors; OUT/dropped lists them. Audio files are never touched.
"""

import argparse
import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cmkt.corpus.audio_checks import Audio, Job, examine, make_job
from cmkt.corpus.checks import ERRORS, Findings, format_set
from cmkt.corpus.repair import repair
from cmkt.corpus.table_checks import OTHERS, REQUIRED, TABLES, Table, check_tables, read_tables
from cmkt.corpus.transcript_checks import check_transcripts, guess_language
from cmkt.errors import CmktError
from cmkt.parallel import journaled_map, parallel_map, read_journal
from cmkt.stage import Stage, atomic_file

SHORT, LONG = 0.1, 60.0  # seconds
CLIPPED = 0.001  # share of the samples
OFFSET = 0.01  # of full scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cmkt validate`."""
    parser.add_argument(
        "dirs", nargs="+", metavar="DIR", help="training set first, then the others"
    )
    parser.add_argument(
        "--lang", choices=("en", "zh"), help="of the transcripts (default: what most of them are)"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=ERRORS,
        metavar="CHECK",
        help=f"make this error a warning (repeatable): {', '.join(ERRORS)}",
    )
    parser.add_argument(
        "--allow_pipes",
        action="store_true",
        help="run the commands in an scp that holds pipes; only for files you trust",
    )
    parser.add_argument("--output_dir", help="folder to make: reports and measurements")
    parser.add_argument("--fix", metavar="OUT", help="data directory to make from the one DIR")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--nj", type=int, default=2, help="parallel jobs (default: %(default)s)")


@dataclass
class Contents:
    """What sets are compared by; each maps something to the line that names it.

    Args:
        speakers: {speaker: one of its utterances}.
        audio: {hash of the samples: utterance}, references included.
        noise: {path or recording of a noise file: its name}.
    """

    speakers: dict[str, str] = field(default_factory=dict)
    audio: dict[bytes, str] = field(default_factory=dict)
    noise: dict[str, str] = field(default_factory=dict)


def run(args: argparse.Namespace) -> None:
    """Run `cmkt validate`."""
    folders = [Path(name) for name in args.dirs]
    _check_arguments(args, folders)
    stage = None
    if args.output_dir:
        stage = Stage(args.output_dir, _tables_of(folders), _options(args, folders))
    if stage is not None and not args.fix and stage.is_done():
        report = json.loads((stage.output / "report.json").read_text(encoding="utf-8"))
        if not args.json:
            print(f"{stage.output}: up to date")
    elif stage is None or stage.is_done():
        report = validate(folders, args, earlier=stage and stage.output)
    else:
        with stage.working_directory() as work:
            report = validate(folders, args, work, stage.output)
            with atomic_file(work / "report.json") as stream:
                json.dump(report, stream, indent=1, ensure_ascii=False)
                stream.write("\n")
            with atomic_file(work / "report.txt") as stream:
                stream.write(format_report(report) + "\n")
    if args.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print(format_report(report))
    if report["errors"] and not args.fix:
        raise CmktError(
            f"{report['errors']} errors in the data",
            remedy="the remedies are above; --allow CHECK makes an error a warning",
        )


def _check_arguments(args: argparse.Namespace, folders: list[Path]) -> None:
    for number, folder in enumerate(folders):
        if not folder.is_dir():
            raise CmktError("no such data directory", folder, remedy="run stage 1 first")
        if folder.resolve() in [other.resolve() for other in folders[:number]]:
            raise CmktError("given twice", folder, remedy="give each directory once")
    if args.nj < 1:
        raise CmktError(f"--nj must be at least 1, not {args.nj}")
    if args.fix and len(folders) > 1:
        raise CmktError("--fix repairs one directory", remedy="give it alone")
    for option in ("output_dir", "fix"):
        output = getattr(args, option) and Path(getattr(args, option)).resolve()
        for folder in folders if output else ():
            # It is replaced as a whole, so no data may lie in it.
            if output == folder.resolve() or output in folder.resolve().parents:
                raise CmktError(
                    f"--{option} would replace {folder}", output, remedy="give another folder"
                )


def _tables_of(folders: list[Path]) -> list[Path]:
    return [folder / name for folder in folders for name in (*TABLES, *OTHERS)]


def _options(args: argparse.Namespace, folders: list[Path]) -> dict:
    """Return what a report depends on besides the tables: options and the files' states."""
    states = hashlib.sha256()
    for folder in folders:
        tables = read_tables(folder, Findings(), ("wav.scp", "spk1.scp"))
        for job in _jobs(tables, args.allow_pipes):
            states.update(job.state.encode())
    return {
        "dirs": [str(folder) for folder in folders],
        "lang": args.lang,
        "allow": sorted(set(args.allow)),
        "allow_pipes": args.allow_pipes,
        "files": states.hexdigest(),
    }


def validate(
    folders: list[Path],
    args: argparse.Namespace,
    work: Path | None = None,
    earlier: Path | None = None,
) -> dict:
    """Check data directories.

    Args:
        folders: the training set first.
        args: the options of the verb.
        work: folder that keeps what was measured; None keeps nothing.
        earlier: output of an earlier run, whose measurements hold for unchanged files.

    Returns:
        the report, JSON-like.
    """
    training, reports = None, []
    for number, folder in enumerate(folders):
        journal = f"audio_{number}.jsonl"
        journals = [path / journal for path in (work, earlier) if path is not None]
        report, contents = _validate_set(folder, args, journals, work and work / journal, training)
        training = training or (folder, contents)
        reports.append(report)
    severities = Counter(f["severity"] for report in reports for f in report["findings"])
    return {"errors": severities["error"], "warnings": severities["warning"], "sets": reports}


def _validate_set(
    folder: Path,
    args: argparse.Namespace,
    journals: list[Path],
    journal: Path | None,
    training: tuple[Path, Contents] | None,
) -> tuple[dict, Contents]:
    findings = Findings()
    tables = read_tables(folder, findings)
    results = _measure(_jobs(tables, args.allow_pipes), journals, journal, args.nj, folder.name)
    report, contents = check_set(folder, tables, results, args, findings)
    if training is not None:
        _compare(*training, contents, tables, findings)
    report["findings"] = findings.summary(report["utterances"], set(args.allow))
    if args.fix:
        repair(folder, tables, findings, Path(args.fix))
    return report, contents


def _jobs(tables: dict[str, Table], allow_pipes: bool) -> Iterator[Job]:
    """List the audio of each utterance; a command is not run unless it is allowed."""
    if "wav.scp" not in tables:
        return
    references = tables["spk1.scp"].values if "spk1.scp" in tables else {}
    for key, value in tables["wav.scp"].values.items():
        paths = (value, references[key]) if key in references else (value,)
        if allow_pipes or not any("|" in path for path in paths):
            yield make_job(key, paths)


def _measure(
    jobs: Iterator[Job], journals: list[Path], journal: Path | None, nj: int, label: str
) -> Iterator[dict]:
    """Examine all jobs, but for those that a journal has the result of, in their order."""
    known = {}
    for path in reversed(journals):
        known |= read_journal(path)
    jobs = list(jobs)
    states = {job.utterance: job.state for job in jobs}
    known = {u: result for u, result in known.items() if states.get(u) == result["state"]}
    todo = [job for job in jobs if job.utterance not in known]
    order = list(states)
    del jobs, states  # memory: there may be very many
    if journal is not None:
        known = journaled_map(examine, todo, known, journal, nj, label)
        return (known[utterance] for utterance in order)
    new = parallel_map(examine, todo, nj, label) if todo else iter(())
    return (known.get(utterance) or next(new) for utterance in order)


def check_set(
    folder: Path,
    tables: dict[str, Table],
    results: Iterator[dict],
    args: argparse.Namespace,
    findings: Findings,
) -> tuple[dict, Contents]:
    """Check one data directory for itself.

    Args:
        folder: the directory.
        tables: see `read_tables`.
        results: of `examine`, in the order of wav.scp.
        args: the options of the verb.
        findings: gets what is wrong.

    Returns:
        its report without findings, and what it is compared by.
    """
    if all(name in tables for name in REQUIRED):
        check_tables(tables, args.allow_pipes, findings)
    text = tables.get("text", Table(folder / "text"))
    speakers = tables["utt2spk"].values if "utt2spk" in tables else {}
    wav = tables.get("wav.scp", Table(folder / "wav.scp"))
    contents = Contents(noise=_noise_of(tables))
    for utterance, speaker in speakers.items():
        contents.speakers.setdefault(speaker, utterance)
    seconds, rates, channels = _check_audio(wav, results, contents, findings)
    lang = args.lang or guess_language(list(text.values.values()))
    durations = dict(zip(wav.values, seconds, strict=False)) if text.values else {}
    check_transcripts(text, durations, lang, findings)
    with_text = sum(1 for key in text.values if key in wav.values)
    total = len(wav.values)
    return {
        "directory": str(folder),
        "kind": "mixtures" if "spk1.scp" in tables else "clean",
        "utterances": total,
        "hours": round(sum(seconds) / 3600, 4),
        "speakers": len(contents.speakers),
        "rates": {str(rate): rates[rate] for rate in sorted(rates)},
        "channels": {str(number): channels[number] for number in sorted(channels)},
        "seconds": _distribution(seconds),
        "language": lang,
        "transcripts": with_text,
        "without_text_share": round(1 - with_text / total, 6) if total else 0.0,
    }, contents


def _distribution(seconds: array) -> dict[str, float]:
    readable = np.array(seconds)
    readable = readable[readable > 0]
    if not len(readable):
        return {}
    quantiles = np.quantile(readable, [0, 0.05, 0.5, 0.95, 1]).round(2).tolist()
    return dict(zip(("min", "p5", "median", "p95", "max"), quantiles, strict=True))


def _check_audio(
    wav: Table, results: Iterator[dict], contents: Contents, findings: Findings
) -> tuple[array, Counter, Counter]:
    """Judge what was measured; return seconds in the order of wav.scp, and counts of forms."""
    seconds, rates, channels = array("d"), Counter(), Counter()
    result = next(results, None)
    first_of: dict[bytes, str] = {}
    for utterance, line in zip(wav.values, wav.numbers, strict=True):
        if result is None or result["utterance"] != utterance:  # a pipe that is not run
            seconds.append(0.0)
            continue
        files = [Audio(*values) for values in result["audio"]]
        result = next(results, None)
        found = _judge(files)
        for check, detail in found:
            findings.add(check, wav.path, line, detail, utterance)
        audio = files[0]
        seconds.append(audio.samples / audio.rate if audio.rate else 0.0)
        if not audio.error:
            rates[audio.rate] += 1
            channels[audio.channels] += 1
        for part, file in enumerate(files):
            if file.error or file.silent:
                continue
            digest = bytes.fromhex(file.digest)
            contents.audio.setdefault(digest, utterance)
            # References of several mixtures may well be the same.
            if part == 0 and first_of.setdefault(digest, utterance) != utterance:
                detail = f"the same as {first_of[digest]}"
                findings.add("duplicate_audio", wav.path, line, detail, utterance)
    if len(rates) > 1:
        detail = ", ".join(f"{rate} Hz: {rates[rate]}" for rate in sorted(rates))
        findings.add("mixed_rates", wav.path, None, detail)
    return seconds, rates, channels


def _judge(files: list[Audio]) -> Iterator[tuple[str, str]]:
    """Yield (check, detail) of an utterance's input and, if there is one, reference."""
    for part, audio in zip(("", "reference: "), files, strict=False):
        if audio.error:
            yield "unreadable_audio", part + audio.error
            continue
        seconds = audio.samples / audio.rate
        if audio.silent:
            yield "silent_audio", f"{part}{seconds:.2f} s"
        if audio.channels > 1:
            yield "several_channels", f"{part}{audio.channels} channels"
        if seconds < SHORT:
            yield "short_audio", f"{part}{seconds:.3f} s"
        if seconds > LONG:
            yield "long_audio", f"{part}{seconds:.1f} s"
        if audio.clipped > CLIPPED:
            yield "clipped_audio", f"{part}{audio.clipped:.2%} of the samples"
        if abs(audio.offset) > OFFSET:
            yield "dc_offset", f"{part}mean {audio.offset:+.3f}"
    if len(files) == 2 and not (files[0].error or files[1].error):
        forms = [f"{audio.samples} samples at {audio.rate} Hz" for audio in files]
        if forms[0] != forms[1]:
            yield "pair_differs", f"{forms[0]}, the reference {forms[1]}"


def _noise_of(tables: dict[str, Table]) -> dict[str, str]:
    """Return {resolved path, or recording: name} of the noise files used."""
    from cmkt.corpus.noise import recording_of

    files = tables["noise.scp"].values if "noise.scp" in tables else {}
    used = tables["utt2noise"].values.values() if "utt2noise" in tables else files
    noise = {}
    for name in dict.fromkeys(itertools.chain(used, files)):
        if name.startswith("babble:"):  # of the set's own speakers
            continue
        recording = recording_of(name)
        # Of other corpora the name says nothing: two noise folders may both hold a 1.wav.
        if name not in files or recording != str(Path(name).with_suffix("")):
            noise.setdefault(f"recording {recording}", name)
        if name in files:
            noise.setdefault(str(Path(files[name]).resolve()), name)
    return noise


def _compare(
    train_dir: Path,
    training: Contents,
    other: Contents,
    tables: dict[str, Table],
    findings: Findings,
) -> None:
    """Find what a set shares with the training set."""
    for speaker, utterance in other.speakers.items():
        if speaker in training.speakers:
            table = tables["utt2spk"]
            detail = f"speaker {speaker}"
            findings.add("shared_speakers", table.path, table.line(utterance), detail)
    for digest, utterance in other.audio.items():
        if digest in training.audio:
            table = tables["wav.scp"]
            detail = f"the same as {training.audio[digest]} in {train_dir}"
            findings.add("shared_audio", table.path, table.line(utterance), detail, utterance)
    shared = {name: key for key, name in other.noise.items() if key in training.noise}
    for name, key in shared.items():
        table = tables.get("noise.scp") or tables["utt2noise"]
        line = table.line(name) if name in table.values else None
        detail = f"{name}: {key} is in {train_dir} as {training.noise[key]}"
        findings.add("shared_noise", table.path, line, detail)


def format_report(report: dict) -> str:
    """Format a report as text: a block for each set, and the sum."""
    blocks = [format_set(part) for part in report["sets"]]
    return "\n\n".join([*blocks, f"{report['errors']} errors, {report['warnings']} warnings"])
