"""Score enhanced speech against its clean references.

Every utterance of the reference list is accounted for: an output that is missing, unreadable or
of another length than its reference, or a metric that is not defined for it, is a failure, named
in `utterances.tsv` and counted in `summary.json`. Paths in wav.scp and spk1.scp are relative to
the current folder.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cmkt.corpus.datadir import read_table
from cmkt.errors import CmktError
from cmkt.stage import Stage, atomic_file

COLUMNS = ("utterance", "snr", "metric", "value", "failure")


@dataclass(frozen=True)
class Score:
    """One metric of one utterance: a value, or the reason why there is none.

    Args:
        utterance: its id.
        snr: SNR of its input in dB, as in utt2snr; empty when not known.
        metric: a key of `cmkt.evaluate.metrics.METRICS`.
        value: the score; None for a failure.
        failure: why there is no value; empty when there is one.
    """

    utterance: str
    snr: str
    metric: str
    value: float | None
    failure: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cmkt score`."""
    parser.add_argument("--enhanced", required=True, help="wav.scp of the speech to score")
    parser.add_argument(
        "--reference_dir",
        required=True,
        help="data directory with spk1.scp (clean) and, for scores per SNR, utt2snr",
    )
    parser.add_argument(
        "--output_dir", required=True, help="folder to make: utterances.tsv and summary.json"
    )
    parser.add_argument(
        "--metrics",
        default="pesq,stoi,estoi,si_snr,snr",
        help="comma-separated, of pesq, stoi, estoi, si_snr, snr, segsnr, csig, cbak, covl "
        "(default: %(default)s)",
    )
    parser.add_argument("--nj", type=int, default=2, help="parallel jobs (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run `cmkt score`."""
    # Workers inherit it. Threads inside them would fight over the cores; set before numpy loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from cmkt.evaluate.metrics import METRICS

    metrics = args.metrics.split(",")
    for name in metrics:
        if name not in METRICS:
            raise CmktError(
                f"--metrics: no such metric: {name!r}", remedy=f"one of {', '.join(METRICS)}"
            )
    if args.nj < 1:
        raise CmktError(f"--nj must be at least 1, not {args.nj}")
    enhanced_scp, reference_dir = Path(args.enhanced), Path(args.reference_dir)
    references, enhanced, snrs = _read_lists(enhanced_scp, reference_dir)
    stage = Stage(
        args.output_dir,
        [enhanced_scp, enhanced_scp.parent]
        + [reference_dir / name for name in ("spk1.scp", "utt2snr", "")],
        # Outputs of other tools come without a marker: watch the files themselves.
        {"metrics": metrics, "enhanced_files": _state_of_files(enhanced)},
    )
    if stage.is_done():
        return
    scores, notes = score_all(references, enhanced, snrs, metrics, args.nj, str(args.output_dir))
    failures = [score for score in scores if score.failure]
    if len(failures) == len(scores):
        raise CmktError(
            f"nothing could be scored; {failures[0].utterance}: {failures[0].failure}",
            enhanced_scp,
            remedy="run stage 7 again, or check that --reference_dir belongs to it",
        )
    stage.output.parent.mkdir(parents=True, exist_ok=True)
    with stage.working_directory() as work:
        write_scores(work / "utterances.tsv", scores)
        with atomic_file(work / "summary.json") as stream:
            json.dump(summarise(scores, metrics, notes), stream, indent=1)
            stream.write("\n")
    for note in notes:
        print(f"cmkt score: note: {note}", file=sys.stderr)
    if failures:
        failed = sorted({score.utterance for score in failures})
        print(
            f"cmkt score: warning: {len(failed)} of {len(references)} utterances have failures, "
            f"the means leave them out: {failed[0]}: {failures[0].failure} "
            f"(all in {stage.output / 'utterances.tsv'})",
            file=sys.stderr,
        )


def _read_lists(
    enhanced_scp: Path, reference_dir: Path
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Read and check what to score: references, outputs and input SNRs by utterance."""
    references = read_table(reference_dir / "spk1.scp")
    enhanced = read_table(enhanced_scp)
    snr_file = reference_dir / "utt2snr"
    snrs = read_table(snr_file) if snr_file.exists() else {}
    if not references:
        raise CmktError("no utterances", reference_dir / "spk1.scp", remedy="run stage 2 again")
    for number, (utterance, path) in enumerate(references.items(), 1):
        if not Path(path).exists():
            raise CmktError(
                f"no such reference audio: {path}",
                reference_dir / "spk1.scp",
                number,
                "run stage 2 again, or run from the recipe's folder",
            )
        try:
            float(snrs.get(utterance, 0))
        except ValueError as error:
            raise CmktError(
                f"the SNR of {utterance} is not a number: {snrs[utterance]!r}",
                snr_file,
                list(snrs).index(utterance) + 1,
                "run stage 2 again",
            ) from error
    for number, (utterance, path) in enumerate(enhanced.items(), 1):
        if "|" in path:
            raise CmktError(
                f"a pipe: {utterance} would run a shell command",
                enhanced_scp,
                number,
                "write the audio to files",
            )
        if utterance not in references:
            raise CmktError(
                f"unknown utterance {utterance}: not in {reference_dir / 'spk1.scp'}",
                enhanced_scp,
                number,
                "give the --reference_dir that it was made from",
            )
    return references, enhanced, snrs


def _state_of_files(table: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for path in map(Path, table.values()):
        status = path.stat() if path.exists() else None
        digest.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def score_all(
    references: dict[str, str],
    enhanced: dict[str, str],
    snrs: dict[str, str],
    metrics: list[str],
    nj: int,
    name: str,
) -> tuple[list[Score], list[str]]:
    """Score every utterance of the reference list in parallel.

    Args:
        references: clean audio file by utterance.
        enhanced: audio file to score by utterance; one that is missing is a failure.
        snrs: SNR of the input in dB by utterance; may lack any.
        metrics: keys of `METRICS`.
        nj: number of processes.
        name: what the progress bar shows.

    Returns:
        one `Score` per utterance and metric, in the order of `references`, and notes on how
        they were computed.

    Raises:
        CmktError: a worker died.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    from cmkt.evaluate.metrics import PESQ_RATE

    tasks = [(u, path, enhanced.get(u), snrs.get(u, ""), metrics) for u, path in references.items()]
    scores, rates = [], set()
    try:
        with ProcessPoolExecutor(nj) as pool:
            results = pool.map(_score_utterance, tasks)
            for rows, rate in tqdm(results, total=len(tasks), desc=f"score {name}", unit="utt"):
                scores.extend(rows)
                rates.add(rate)
    except BrokenProcessPool as error:
        raise CmktError("a scoring process died", remedy="out of memory? lower --nj") from error
    others = sorted(rate for rate in rates if rate not in (None, PESQ_RATE))
    notes = [
        f"PESQ is wide-band at {PESQ_RATE} Hz, and so are the composite measures; "
        f"audio at {rate} Hz was converted to it"
        for rate in others
        if {"pesq", "csig", "cbak", "covl"} & set(metrics)
    ]
    return scores, notes


def _score_utterance(task: tuple) -> tuple[list[Score], int | None]:
    """Return all scores of one utterance and its sampling rate in Hz (None if unreadable)."""
    from cmkt.corpus.audio import read_audio
    from cmkt.evaluate.metrics import METRICS, MetricError

    utterance, reference_path, enhanced_path, snr, metrics = task
    try:
        if enhanced_path is None:
            raise CmktError("missing in the list of outputs")
        reference, reference_rate = read_audio(reference_path)
        enhanced, rate = read_audio(enhanced_path)
        if rate != reference_rate:
            raise CmktError(f"{rate} Hz, the reference {reference_rate} Hz", enhanced_path)
        if len(enhanced) != len(reference):
            raise CmktError(
                f"{len(enhanced)} samples, the reference {len(reference)}", enhanced_path
            )
    except CmktError as error:
        reason = " ".join(str(error).split())  # one line, no tab: it goes into a table
        return [Score(utterance, snr, metric, None, reason) for metric in metrics], None
    rows = []
    for metric in metrics:
        try:
            value = METRICS[metric].function(reference, enhanced, rate)
            rows.append(Score(utterance, snr, metric, value, ""))
        except MetricError as error:
            rows.append(Score(utterance, snr, metric, None, " ".join(str(error).split())))
    return rows, rate


def write_scores(path: Path, scores: list[Score]) -> None:
    """Write utterances.tsv: a header, then one row per utterance and metric."""
    with atomic_file(path) as stream:
        stream.write("\t".join(COLUMNS) + "\n")
        for s in scores:
            value = "" if s.value is None else f"{s.value:.6f}"
            stream.write(f"{s.utterance}\t{s.snr}\t{s.metric}\t{value}\t{s.failure}\n")


def read_scores(path: Path) -> list[Score]:
    """Read utterances.tsv.

    Raises:
        CmktError: not such a table; names the line.
    """
    scores = []
    with path.open(encoding="utf-8", newline="") as stream:
        rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tuple(next(rows, ())) != COLUMNS:
            raise CmktError("not a score table", path, 1, "run stage 8 again")
        for number, row in enumerate(rows, 2):
            try:
                utterance, snr, metric, value, failure = row
                scores.append(
                    Score(utterance, snr, metric, float(value) if value else None, failure)
                )
            except ValueError as error:
                raise CmktError("not a score", path, number, "run stage 8 again") from error
    return scores


def snr_groups(snrs: dict[str, str]) -> dict[str, str]:
    """Name the SNR group of each utterance.

    Args:
        snrs: SNR in dB by utterance; an empty one is in no group.

    Returns:
        the SNR itself where a set has at most ten different ones, else the nearest multiple of
        5 dB; in dB, as text, by utterance.
    """
    values = {utterance: float(snr) for utterance, snr in snrs.items() if snr}
    if len(set(values.values())) > 10:
        values = {utterance: 5.0 * round(value / 5) for utterance, value in values.items()}
    return {utterance: f"{value + 0.0:g}" for utterance, value in values.items()}


def summarise(scores: list[Score], metrics: list[str], notes: list[str]) -> dict:
    """Summarise scores: n, failures, mean and 95 % interval, overall and per SNR.

    Args:
        scores: of one system on one test set.
        metrics: in the order to list them.
        notes: remarks to keep beside the numbers.

    Returns:
        a JSON-like dictionary; mean and bounds are None where nothing could be scored.
    """
    groups = snr_groups({score.utterance: score.snr for score in scores})
    per_snr = {
        snr: _per_metric([s for s in scores if groups.get(s.utterance) == snr], metrics)
        for snr in sorted(set(groups.values()), key=float)
    }
    return {
        "n_utterances": len({score.utterance for score in scores}),
        "interval": "95 % percentile bootstrap over utterances",
        "metrics": _per_metric(scores, metrics),
        "per_snr": per_snr,
        "failures": [
            {"utterance": s.utterance, "metric": s.metric, "failure": s.failure}
            for s in scores
            if s.failure
        ],
        "notes": notes,
    }


def _per_metric(scores: list[Score], metrics: list[str]) -> dict[str, dict]:
    from cmkt.evaluate.statistics import bootstrap_mean

    summary = {}
    for metric in metrics:
        chosen = [score for score in scores if score.metric == metric]
        values = [score.value for score in chosen if score.value is not None]
        interval = bootstrap_mean(values) if values else None
        summary[metric] = {
            "n": len(values),
            "failures": len(chosen) - len(values),
            "mean": interval and interval.mean,
            "low": interval and interval.low,
            "high": interval and interval.high,
        }
    return summary
