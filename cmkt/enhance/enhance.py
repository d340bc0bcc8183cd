"""Enhance audio files, whole folders, or the wav.scp of a data directory (stage 7).

    cmkt enhance exp/blstm_seed0/export noisy.wav recordings/ -o enhanced

Files keep their names, folders their structure; level, sampling rate, length, channels and
sample format stay those of the input. Each channel is enhanced by itself. Audio at another rate
is converted to the model's and back, so nothing above half the model's rate is left. Recordings of
more than 30 s are enhanced in overlapping segments, in bounded memory. An input `*.scp` gives
OUT/<id>.wav and OUT/wav.scp. The same command run again does only what is missing or out of date.
"""

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cmkt.corpus.datadir import read_table, write_table
from cmkt.errors import CmktError
from cmkt.stage import MARKER, Stage, fingerprint

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64")
UNREADABLE_SUFFIXES = (".m4a", ".aac", ".wma", ".mp4", ".webm", ".ape")
RECORD = ".enhanced"  # in OUT: what earlier runs made there, and from what


@dataclass(frozen=True)
class Task:
    """One file to enhance.

    Args:
        source: the input.
        target: the output.
        seconds: how long it is.
    """

    source: Path
    target: Path
    seconds: float


def add_arguments(parser) -> None:
    """Add the options of `cmkt enhance`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="export folder (stage 6)")
    parser.add_argument(
        "inputs", type=Path, nargs="+", metavar="INPUT", help="audio files, folders, or one *.scp"
    )
    parser.add_argument(
        "-o", "--output_dir", type=Path, required=True, metavar="OUT", help="folder to write to"
    )
    parser.add_argument("--nj", type=int, default=1, help="processes on CPU (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files in OUT that were not made by this command",
    )


def run(args) -> None:
    """Run `cmkt enhance`."""
    # Workers inherit it; set before torch loads. One thread each also makes the result
    # independent of --nj.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from cmkt.enhance.loading import EXPORT_FILES, check_export

    if args.nj < 1:
        raise CmktError(f"--nj must be at least 1, not {args.nj}")
    check_export(args.model)
    model_files = [args.model / name for name in EXPORT_FILES]
    if any(path.suffix == ".scp" for path in args.inputs):
        if len(args.inputs) > 1:
            raise CmktError("an scp cannot be mixed with other inputs", remedy="run them apart")
        _enhance_scp(args, model_files)
    else:
        _enhance_files(args, model_files)


def _enhance_scp(args, model_files: list[Path]) -> None:
    """Enhance a wav.scp into a folder that belongs to this stage alone."""
    scp, output = args.inputs[0], args.output_dir
    sources = _read_scp(scp)
    # A list made by a stage is as old as the stage's marker; for others watch the audio itself.
    marked = (scp.parent / MARKER).exists()
    state = None if marked else _state_of_files(list(sources.values()))
    stage = Stage(output, [scp, scp.parent, *model_files], {"files": state})
    if stage.is_done():
        print(f"{output}: up to date")
        return
    if output.exists() and any(output.iterdir()) and not (output / MARKER).exists():
        raise CmktError(
            "the output folder holds other files, an scp needs one of its own",
            output,
            remedy="give another -o, or empty it",
        )
    seconds = {key: _seconds(path) for key, path in sources.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    with stage.working_directory() as work:
        tasks = [Task(path, work / f"{k}.wav", seconds[k]) for k, path in sources.items()]
        _enhance_all([task for task in tasks if not task.target.exists()], args, str(output))
        write_table(work / "wav.scp", {key: output / f"{key}.wav" for key in sources})


def _read_scp(scp: Path) -> dict[str, Path]:
    sources = {}
    for number, (key, value) in enumerate(read_table(scp).items(), 1):
        if "|" in value:
            raise CmktError(
                f"a pipe: {key} would run a shell command", scp, number, "write the audio to files"
            )
        if "/" in key or key.startswith("."):
            raise CmktError(f"id {key!r} cannot be a file name", scp, number, "rename it")
        if not Path(value).is_file():
            raise CmktError(
                f"no such audio file: {value}", scp, number, "paths are relative to this folder"
            )
        sources[key] = Path(value)
    if not sources:
        raise CmktError("no utterances", scp, remedy="run the stage that makes it")
    return sources


def _enhance_files(args, model_files: list[Path]) -> None:
    """Enhance files and folders into a folder that may hold other things."""
    output = args.output_dir
    if output.exists() and not output.is_dir():
        raise CmktError("the output is a file", output, remedy="give a folder with -o")
    targets = _plan(args.inputs, output)
    record = output / RECORD
    made = _read_record(record)
    tasks, states = [], {}
    for target, source in targets.items():
        name = target.relative_to(output).as_posix()
        state = fingerprint(model_files, {"source": _state_of_files([source.resolve()])})
        if target.exists() and made.get(name) == state:
            continue
        if target.exists() and name not in made and not args.overwrite:
            raise CmktError(
                "already there, and not made by this command",
                target,
                remedy="give another -o, or --overwrite",
            )
        tasks.append(Task(source, target, _seconds(source)))
        states[target] = f"{state} {name}\n"
    if not tasks:
        print(f"{output}: up to date")
        return
    for folder in {task.target.parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    with record.open("a", encoding="utf-8") as stream:
        stream.write("\n")  # a killed run may have cut the last line

        def done(task: Task) -> None:
            stream.write(states[task.target])
            stream.flush()

        _enhance_all(tasks, args, str(output), done)


def _plan(inputs: list[Path], output: Path) -> dict[Path, Path]:
    """Say which file is made from which: {target: source}."""
    targets: dict[Path, Path] = {}
    for given in inputs:
        if given.is_dir():
            pairs = [(output / path.relative_to(given), path) for path in _audio_in(given, output)]
        elif given.exists():
            pairs = [(output / given.name, given)]
        else:
            raise CmktError("no such file or folder", given)
        for target, source in pairs:
            if target.resolve() == source.resolve():
                raise CmktError("would overwrite its input", target, remedy="give another -o")
            if targets.setdefault(target, source) != source:
                raise CmktError(
                    f"two inputs would get this name: {targets[target]} and {source}",
                    target,
                    remedy="enhance them into different folders",
                )
    return targets


def _audio_in(folder: Path, output: Path) -> list[Path]:
    """List the audio files of a folder and its subfolders, less an output folder inside it."""
    inside = folder.resolve() in output.resolve().parents
    found, unreadable = [], []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        if inside and output.resolve() in path.resolve().parents:
            continue
        if path.suffix.lower() in SUFFIXES:
            found.append(path)
        elif path.suffix.lower() in UNREADABLE_SUFFIXES:
            unreadable.append(path)
    if unreadable:
        print(
            f"cmkt enhance: warning: {len(unreadable)} files left out, {unreadable[0]} first: "
            "not a format that libsndfile reads (convert them to wav or flac)",
            file=sys.stderr,
        )
    if not found:
        raise CmktError(f"no audio files in it: no {', '.join(SUFFIXES)}", folder)
    return found


def _read_record(record: Path) -> dict[str, str]:
    """Read {output name: what it was made from}."""
    if not record.exists():
        return {}
    lines = record.read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(" ") for line in lines)
    return {name: state for state, _, name in pairs}


def _seconds(path: Path) -> float:
    from cmkt.enhance.chunks import read_header

    header = read_header(path)
    return header.frames / header.samplerate


def _state_of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _enhance_all(tasks: list[Task], args, name: str, done=lambda task: None) -> None:
    """Enhance files with a progress bar; name every failure, go on, and fail at the end.

    Args:
        tasks: what to do.
        args: options of the verb: model, device, nj.
        name: what the progress bar shows.
        done: called with each task that succeeded.
    """
    import torch
    from tqdm import tqdm

    from cmkt.enhance.loading import Enhancer

    failures: list[str] = []
    nj = 1 if args.device != "cpu" else min(args.nj, len(tasks))
    total = sum(task.seconds for task in tasks)
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]"
    with tqdm(total=total, desc=f"enhance {name}", bar_format=form) as bar:

        def advance(seconds: float) -> None:
            bar.update(min(seconds, total - bar.n))  # rounding must not pass 100 %

        def finish(task: Task, remarks: list[str], failure: str | None) -> None:
            for remark in remarks:
                bar.write(f"cmkt enhance: warning: {remark}", file=sys.stderr)
            if failure:
                bar.write(f"cmkt enhance: error: {failure}", file=sys.stderr)
                failures.append(failure)
            else:
                done(task)

        if nj == 1:
            torch.set_num_threads(1)
            enhancer = Enhancer(args.model, args.device)
            for task in tasks:
                finish(task, *_enhance_one(enhancer, task, advance))
        else:
            for task, remarks, failure in _in_processes(tasks, args, nj):
                finish(task, remarks, failure)
                advance(task.seconds)
    if failures:
        raise CmktError(
            f"{len(failures)} of {len(tasks)} files failed, the first: {failures[0]}",
            remedy="mend it and run the same command again; what is done stays",
        )


def _in_processes(tasks: list[Task], args, nj: int):
    """Yield (task, remarks, failure) in the order in which they are done."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    # Not fork: torch has threads by now, and a forked copy of them can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(nj, context, _one_thread) as pool:
        # Longest first, so that no long recording is left over at the end.
        ordered = sorted(tasks, key=lambda task: -task.seconds)
        futures = {pool.submit(_work, args.model, args.device, t): t for t in ordered}
        try:
            for future in as_completed(futures):
                yield (futures[future], *future.result())
        except BrokenProcessPool as error:
            raise CmktError("a process died", remedy="out of memory? lower --nj") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _load(model: Path, device: str):
    """Load the model once per worker process."""
    from cmkt.enhance.loading import Enhancer

    return Enhancer(model, device)


def _work(model: Path, device: str, task: Task):
    return _enhance_one(_load(model, device), task)


def _enhance_one(enhancer, task: Task, progress=lambda _: None) -> tuple[list[str], str | None]:
    """Enhance one file; return remarks, and the failure if any."""
    from cmkt.enhance.chunks import enhance_file

    try:
        return enhance_file(enhancer, task.source, task.target, progress), None
    except CmktError as error:
        return [], str(error)
