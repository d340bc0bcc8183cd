"""Apply a function to many items on the processes of this machine or on a cluster."""

import importlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from cmkt.errors import CmktError
from cmkt.settings import read_mapping
from cmkt.stage import atomic_file

#: Where the workers of a cluster run: `env` of its YAML and the Dask class that starts them.
CLUSTERS = {
    "local": "distributed:LocalCluster",
    "slurm": "dask_jobqueue:SLURMCluster",
    "pbs": "dask_jobqueue:PBSCluster",
    "sge": "dask_jobqueue:SGECluster",
    "lsf": "dask_jobqueue:LSFCluster",
}

_function: Callable | None = None


def _start_worker(function: Callable) -> None:
    """Keep what the worker applies, and end the worker when its parent is killed."""
    global _function
    _function = function
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _apply(item):
    return _function(item)


def parallel_map(
    function: Callable, items: list, nj: int, label: str, spawn: bool = False
) -> Iterator:
    """Yield function(item) of every item, in order, from `nj` processes, with a progress bar.

    Args:
        function: can be pickled if `spawn`.
        items: what it is applied to.
        nj: number of processes; with 1 the work is done in this one.
        label: of the progress bar.
        spawn: start new interpreters instead of forking this one, for functions that use torch,
            whose threads do not survive a fork.

    Raises:
        CmktError: a process was killed.
    """
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own: the next processes are forked from this one
    bar = {"total": len(items), "desc": label, "unit": "utt", "mininterval": 0.5}
    if nj == 1 or len(items) < 2:
        yield from tqdm(map(function, items), **bar)
        return
    context = multiprocessing.get_context("spawn" if spawn else None)
    with ProcessPoolExecutor(nj, context, _start_worker, (function,)) as pool:
        try:
            # Few large messages for short work, but every process gets something to do.
            chunk = max(1, min(8, len(items) // nj))
            yield from tqdm(pool.map(_apply, items, chunksize=chunk), **bar)
        except BrokenProcessPool as error:
            raise CmktError(
                "a job ended unexpectedly, perhaps for want of memory",
                remedy="run the same command again, with a smaller --nj",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_journal(path: Path) -> dict[str, dict]:
    """Return the results in a journal by utterance, without the line that a run was killed in."""
    results = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
            except ValueError:
                continue
            results[result["utterance"]] = result
    return results


def journaled_map(
    function: Callable[..., dict],
    items: list,
    known: dict[str, dict],
    journal: Path,
    nj: int,
    label: str,
    spawn: bool = False,
) -> dict[str, dict]:
    """Apply a function to items, so that a killed run need not begin again.

    Args:
        function: returns a JSON-like result that names its `utterance`.
        items: those that `known` does not hold.
        known: results of earlier runs, by utterance.
        journal: file of all results, JSON lines; `read_journal` reads it.
        nj: see `parallel_map`, as `label` and `spawn`.

    Returns:
        results by utterance, those of `known` first.
    """
    results = dict(known)
    with atomic_file(journal) as stream:
        stream.writelines(json.dumps(result) + "\n" for result in results.values())
    with journal.open("a", encoding="utf-8") as stream:
        for result in parallel_map(function, items, nj, label, spawn):
            stream.write(json.dumps(result) + "\n")
            stream.flush()
            results[result["utterance"]] = result
    return results


@contextmanager
def cluster_client(path: str | Path) -> Iterator:
    """Start the workers that a cluster YAML names; give a `distributed.Client`.

    Args:
        path: for example `conf/cluster/slurm.yaml`: `env` (one of `CLUSTERS`), `n_workers`, and
            `options` of the Dask class.

    Raises:
        CmktError: a wrong YAML, or Dask is not installed.
    """
    conf = read_mapping(path, "cluster configuration", "see conf/cluster/")
    if conf.keys() - {"env", "n_workers", "options"}:
        raise CmktError("want the keys env, n_workers and options", path)
    if conf.get("env") not in CLUSTERS:
        raise CmktError(f"env {conf.get('env')}: want one of {', '.join(CLUSTERS)}", path)
    module, _, name = CLUSTERS[conf["env"]].partition(":")
    try:
        from distributed import Client

        kind = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise CmktError(
            f"{error.name} is not installed", path, remedy="pip install 'cmkt[cluster]'"
        ) from error
    options, workers = conf.get("options") or {}, conf.get("n_workers", 1)
    try:
        cluster = kind(n_workers=workers, **options)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise CmktError(f"the cluster does not start: {error}", path) from error
    with cluster, Client(cluster) as client:
        yield client


def cluster_map(function: Callable, items: list, path: str | Path, label: str) -> Iterator:
    """Yield function(item) of every item, in no order, from the workers of a cluster.

    Args:
        function: can be pickled.
        items: what it is applied to, one task each.
        path: a cluster YAML (see `cluster_client`); its workers share this file system.
        label: of the progress bar.
    """
    from tqdm import tqdm

    with cluster_client(path) as client:
        from distributed import as_completed

        tasks = client.map(function, items, pure=False)
        for task in tqdm(as_completed(tasks), total=len(items), desc=label, mininterval=0.5):
            yield task.result()
