"""Which of the processes of a distributed training this one is, as ESPnet decides it."""

import argparse

from espnet2.train.distributed_utils import get_node_rank, get_rank, resolve_distributed_mode

from cmkt.errors import CmktError


def is_leader(args: argparse.Namespace) -> bool:
    """Tell whether this process prepares, logs and finishes the experiment.

    Args:
        args: ESPnet's options; `--dist_launcher slurm` and the variables RANK and WORLD_SIZE of
            other launchers count as in ESPnet.

    Returns:
        true for rank 0, for the process of the first node that starts the others of its node, and
        without other processes.

    Raises:
        CmktError: options that ESPnet refuses, for example a launcher without its variables.
    """
    args = argparse.Namespace(**vars(args))
    try:
        resolve_distributed_mode(args)
        if not args.distributed:
            return True
        rank_of = get_node_rank if args.dist_launcher == "mpi" else get_rank
        return (rank_of(args.dist_rank, args.dist_launcher) or 0) == 0
    except (RuntimeError, KeyError) as error:
        raise CmktError(f"distributed training: {error}", remedy="see docs/training.md") from error
