"""The ESPnet task: stock enhancement plus `transfer`, `transfer_conf` and `mixing_conf`."""

import argparse

import torch
from espnet2.tasks.enh import EnhancementTask
from espnet2.utils.nested_dict_action import NestedDictAction
from typeguard import TypeCheckError

import cmkt.espnet_plugin.data  # noqa: F401  registers the data type linguistic_ark
from cmkt.errors import CmktError
from cmkt.espnet_plugin.mixing import EpochIterFactory, SortedCollate, build_mixing
from cmkt.espnet_plugin.model import TransferEnhancementModel, add_transfer
from cmkt.linguistic.statistics import read_statistics
from cmkt.transfer import Targets


class TransferEnhancementTask(EnhancementTask):
    """`EnhancementTask` whose model can learn from the linguistic sequence of an utterance."""

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser):
        """Add ESPnet's arguments and ours."""
        super().add_task_arguments(parser)
        group = parser.add_argument_group("Cross-modality transfer")
        group.add_argument(
            "--transfer",
            choices=["none", "cmkt"],
            default="none",
            help="Align the separator with token embeddings of the transcript (docs/method.md)",
        )
        group.add_argument(
            "--transfer_conf",
            action=NestedDictAction,
            default={},
            help="tap, alpha, reduction, standardise, pca, alignment, misalignment, linguistic_dim",
        )
        group.add_argument(
            "--linguistic_statistics",
            help="statistics.npz of the training set's store, for standardise and pca; "
            "--llm_dir sets it",
        )
        group.add_argument(
            "--mixing_conf",
            action=NestedDictAction,
            default={},
            help="On-the-fly mixing of the training data (conf/mixing/, docs/data.md); "
            "--mixing_config of `cmkt train` sets it",
        )
        group.add_argument(
            "--linguistic_meta",
            action=NestedDictAction,
            default={},
            help="What the store of --llm_dir says of itself; recorded, not used",
        )

    @classmethod
    def optional_data_names(cls, train: bool = True, inference: bool = False):
        """Name the data that may be given; the linguistic sequence never at inference."""
        names = super().optional_data_names(train, inference)
        return names if inference else (*names, "linguistic")

    @classmethod
    def build_preprocess_fn(cls, args: argparse.Namespace, train: bool):
        """Return the on-the-fly mixing of a training that has it, else what ESPnet returns."""
        if train and args.mixing_conf:
            return build_mixing(
                args.mixing_conf, args.noise_scp, args.rir_scp, args.sample_rate, args.seed
            )
        return super().build_preprocess_fn(args, train)

    @classmethod
    def build_collate_fn(cls, args: argparse.Namespace, train: bool):
        """Return ESPnet's collation; on-the-fly mixing may have changed the order of lengths."""
        collate = super().build_collate_fn(args, train)
        return SortedCollate(collate) if train and args.mixing_conf else collate

    @classmethod
    def build_sequence_iter_factory(cls, args: argparse.Namespace, iter_options, mode: str):
        """Return ESPnet's factory; on-the-fly mixing is told the epoch."""
        factory = super().build_sequence_iter_factory(args, iter_options, mode)
        mixes = mode == "train" and args.mixing_conf
        return EpochIterFactory(factory) if mixes else factory

    @classmethod
    def check_required_command_args(cls, args: argparse.Namespace):
        """Refuse settings that cannot work, before anything is read."""
        super().check_required_command_args(args)
        if args.transfer == "none" or args.collect_stats:
            return
        for mode in ("train", "valid"):
            kind = getattr(args, "valid_iterator_type", None) if mode == "valid" else None
            kind = kind or args.iterator_type
            if "chunk" in kind:
                raise CmktError(
                    f"iterator_type {kind} cuts utterances, a transcript belongs to a whole one",
                    args.config,
                    remedy="use iterator_type: sequence, or transfer: none",
                )
            data = getattr(args, f"{mode}_data_path_and_name_and_type")
            if "linguistic" not in [name for _, name, _ in data]:
                raise CmktError(
                    f"transfer is on but the {mode} data has no `linguistic`",
                    args.config,
                    remedy="give --llm_dir, or "
                    f"--{mode}_data_path_and_name_and_type SCP,linguistic,linguistic_ark",
                )

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> TransferEnhancementModel:
        """Build the stock model first, so that its initialisation is unchanged, then ours."""
        try:
            model = super().build_model(args)
        except (TypeError, ValueError, TypeCheckError, AttributeError) as error:
            raise CmktError(
                f"the model cannot be built: {error}",
                getattr(args, "config", None),
                remedy="`cmkt train --print_config` lists the keys of every part",
            ) from error
        conf = args.transfer_conf if args.transfer == "cmkt" else None
        model = add_transfer(model, args.separator, conf, args.model_conf)
        if model.transfer is not None and model.transfer.targets.needs_statistics:
            set_statistics(model.transfer.targets, args.linguistic_statistics)
        return model


def set_statistics(targets: Targets, path: str | None) -> None:
    """Set the mean and covariance of a linguistic store.

    Args:
        targets: of the transfer.
        path: statistics.npz of the training set's store.

    Raises:
        CmktError: none is given, it cannot be read, or it is of another dimension.
    """
    if path is None:
        raise CmktError(
            "transfer_conf.standardise and pca need the statistics of the training set",
            remedy="give --llm_dir, or --linguistic_statistics STORE/statistics.npz",
        )
    mean, covariance = map(torch.from_numpy, read_statistics(path))
    if len(mean) != len(targets.mean):
        raise CmktError(
            f"statistics of {len(mean)} dimensions, but linguistic_dim is {len(targets.mean)}", path
        )
    targets.set_statistics(mean, covariance)
