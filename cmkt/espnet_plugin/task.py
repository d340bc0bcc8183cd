"""The ESPnet task: stock enhancement plus `transfer`, `transfer_conf` and `mixing_conf`."""

import argparse
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from espnet2.tasks.enh import (
    EnhancementTask,
    criterion_choices,
    loss_wrapper_choices,
    separator_choices,
)
from espnet2.train import trainer as espnet_trainer
from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import str2bool
from typeguard import TypeCheckError

import cmkt.espnet_plugin.data  # noqa: F401  registers the data type linguistic_ark
from cmkt.errors import CmktError
from cmkt.espnet_plugin.batching import BY_BINS, check_batch_bins, read_lengths, write_clipped
from cmkt.espnet_plugin.build import OWN_SEPARATORS, find_class, load_best
from cmkt.espnet_plugin.criterions import CRITERIONS
from cmkt.espnet_plugin.cropping import build_cropping
from cmkt.espnet_plugin.data import read_candidates
from cmkt.espnet_plugin.initial import check_initial_weights
from cmkt.espnet_plugin.mixing import EpochIterFactory, SortedCollate, build_mixing
from cmkt.espnet_plugin.model import CONF_KEYS, TransferEnhancementModel, add_transfer
from cmkt.espnet_plugin.recurrent import run_layer_by_layer
from cmkt.espnet_plugin.rivals import fill_sample_rate
from cmkt.espnet_plugin.spectral_criterions import SPECTRAL_CRITERIONS, SPECTRAL_WRAPPERS
from cmkt.linguistic.statistics import read_statistics
from cmkt.transfer import Targets

criterion_choices.classes.update(CRITERIONS | SPECTRAL_CRITERIONS)
loss_wrapper_choices.classes.update(SPECTRAL_WRAPPERS)
for own in OWN_SEPARATORS:
    separator_choices.classes[own] = find_class("separator", own, OWN_SEPARATORS)


class TransferTrainer(espnet_trainer.Trainer):
    """ESPnet's trainer, which tells the transfer how much of the training is over."""

    @classmethod
    def run(cls, model, train_iter_factory, trainer_options, **others):
        """Train; arguments as ESPnet's."""
        if model.transfer is not None:
            train_iter_factory = EpochIterFactory(
                train_iter_factory,
                lambda epoch: setattr(
                    model.transfer, "progress", (epoch - 1) / trainer_options.max_epoch
                ),
            )
        super().run(
            model=model,
            train_iter_factory=train_iter_factory,
            trainer_options=trainer_options,
            **others,
        )


class TransferEnhancementTask(EnhancementTask):
    """`EnhancementTask` whose model can learn from the linguistic sequence of an utterance."""

    trainer = TransferTrainer

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
            help=", ".join(CONF_KEYS),
        )
        group.add_argument(
            "--fast_cpu",
            type=str2bool,
            default=False,
            help="On a CPU, train several times faster: LSTMs and GRUs run layer by layer, without "
            "packing, and denormal numbers count as 0. The same results to rounding",
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
        group.add_argument(
            "--max_duration",
            type=float,
            help="Crop longer training utterances to at most this many seconds, at words where "
            "their times are known; their text is cropped alike (docs/training.md)",
        )
        group.add_argument(
            "--word_times",
            help="Word times (CTM) of the training set for --max_duration; `cmkt train` takes the "
            "file ctm of --train_dir",
        )
        group.add_argument(
            "--linguistic_tokens",
            help="Table `tokens` of the training store, for --max_duration; --llm_dir sets it",
        )
        group.add_argument(
            "--amp_dtype",
            choices=["float16", "bfloat16"],
            help="Precision of --use_amp true (default: ESPnet's, bfloat16 where the GPU has it)",
        )

    @classmethod
    def optional_data_names(cls, train: bool = True, inference: bool = False):
        """Name the data that may be given; the linguistic sequence never at inference."""
        names = super().optional_data_names(train, inference)
        return names if inference else (*names, "linguistic", "token_ids")

    @classmethod
    def main_worker(cls, args: argparse.Namespace):
        """Train, or collect statistics, in this process."""
        # Gradients that fade over many frames become denormal numbers, which a CPU computes with
        # many times slower.
        torch.set_flush_denormal(args.fast_cpu)
        log_as_leader(args)
        chosen_by_espnet = espnet_trainer.autocast_args
        if args.amp_dtype is not None:
            # ESPnet has no option: it decides when it is imported.
            espnet_trainer.autocast_args = {"dtype": getattr(torch, args.amp_dtype)}
        try:
            super().main_worker(args)
        finally:
            torch.set_flush_denormal(False)
            espnet_trainer.autocast_args = chosen_by_espnet

    @classmethod
    def build_preprocess_fn(cls, args: argparse.Namespace, train: bool):
        """Return the cropping and on-the-fly mixing of a training, else what ESPnet returns."""
        if train and args.mixing_conf:
            preprocess = build_mixing(
                args.mixing_conf, args.noise_scp, args.rir_scp, args.sample_rate, args.seed
            )
        else:
            preprocess = super().build_preprocess_fn(args, train)
        if not train or args.max_duration is None:
            return preprocess
        return build_cropping(
            args.seed,
            longest(args),
            args.sample_rate,
            read_lengths(args.train_shape_file[0]),
            args.word_times,
            args.linguistic_tokens,
            preprocess,
        )

    @classmethod
    def build_collate_fn(cls, args: argparse.Namespace, train: bool):
        """Return ESPnet's collation; mixing and cropping may have changed the order of lengths."""
        collate = super().build_collate_fn(args, train)
        return SortedCollate(collate) if train and draws_by_epoch(args) else collate

    @classmethod
    def build_sequence_iter_factory(cls, args: argparse.Namespace, iter_options, mode: str):
        """Return ESPnet's factory; cropping and mixing are told the epoch."""
        if mode != "train" or not draws_by_epoch(args):
            return super().build_sequence_iter_factory(args, iter_options, mode)
        with TemporaryDirectory() as folder:  # the sampler reads the lengths at once
            if args.max_duration is not None:
                clipped = f"{folder}/shape"
                write_clipped(iter_options.shape_files[0], clipped, longest(args))
                iter_options.shape_files = [clipped, *iter_options.shape_files[1:]]
            factory = super().build_sequence_iter_factory(args, iter_options, mode)
        return EpochIterFactory(
            factory, lambda epoch: setattr(factory.dataset.preprocess, "epoch", epoch)
        )

    @classmethod
    def check_required_command_args(cls, args: argparse.Namespace):
        """Refuse settings that cannot work, before anything is read."""
        super().check_required_command_args(args)
        if args.collect_stats:
            return
        check_batches(args)
        if args.transfer == "none":
            return
        if args.ngpu > 1 and not args.multiprocessing_distributed:
            raise CmktError(
                "transfer is on, and several GPUs want a process each",
                args.config,
                remedy="give --multiprocessing_distributed true",
            )
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
        model = cls.build_bare_model(args)
        for init_param in args.init_param:
            check_initial_weights(model, init_param, args.separator, args.ignore_init_mismatch)
        if model.transfer is None:
            return model
        if model.transfer.targets.needs_statistics:
            set_statistics(model.transfer.targets, args.linguistic_statistics)
        paths = {name: path for path, name, _ in args.valid_data_path_and_name_and_type}
        if "linguistic" in paths:
            candidates = read_candidates(paths["linguistic"], paths.get("token_ids"))
            model.transfer.set_candidates(*candidates)
        return model

    @classmethod
    def build_bare_model(cls, args: argparse.Namespace) -> TransferEnhancementModel:
        """Build the model without the statistics and candidates that come from data."""
        args.criterions = fill_sample_rate(args.criterions, args.sample_rate)
        try:
            model = super().build_model(args)
        except (TypeError, ValueError, TypeCheckError, AttributeError) as error:
            raise CmktError(
                f"the model cannot be built: {error}",
                getattr(args, "config", None),
                remedy="`cmkt train --print_config` lists the keys of every part",
            ) from error
        if getattr(args, "fast_cpu", False):
            run_layer_by_layer(model.separator)
        conf = args.transfer_conf if args.transfer == "cmkt" else None
        return add_transfer(model, args.separator, conf, args.model_conf, args.sample_rate)


def log_as_leader(args: argparse.Namespace) -> None:
    """Log as `cmkt train` does, in the first of the processes that ESPnet starts for the GPUs."""
    started = args.distributed and args.multiprocessing_distributed
    if started and args.dist_rank == 0 and not logging.getLogger().handlers:
        from cmkt.espnet_plugin.train import log_to

        experiment = Path(args.output_dir)
        log_to(open(experiment / "train.log", "a"), experiment.name)


def longest(args: argparse.Namespace) -> int | None:
    """Return to how many samples training utterances are cropped; None for no cropping."""
    return None if args.max_duration is None else int(args.max_duration * args.sample_rate)


def draws_by_epoch(args: argparse.Namespace) -> bool:
    """Tell whether an utterance of the training set is another one in each epoch."""
    return bool(args.mixing_conf) or args.max_duration is not None


def check_batches(args: argparse.Namespace) -> None:
    """Refuse a maximum duration that cannot be kept, and batches too small for an utterance.

    Raises:
        CmktError: a duration of no sample or without the lengths of the utterances, or a
            `batch_bins` below the longest utterance.
    """
    if args.max_duration is not None:
        if longest(args) < 1:
            raise CmktError(f"max_duration {args.max_duration}: want seconds above 0", args.config)
        if not args.train_shape_file or args.iterator_type != "sequence":
            raise CmktError(
                "max_duration needs iterator_type: sequence and the lengths of the utterances",
                args.config,
                remedy="give --stats_dir, or --train_shape_file",
            )
    for mode, prefix in (("train", ""), ("valid", "valid_")):
        kind = getattr(args, f"{prefix}batch_type") or args.batch_type
        bins = getattr(args, f"{prefix}batch_bins") or args.batch_bins
        if kind in BY_BINS:
            shape_files = getattr(args, f"{mode}_shape_file")
            check_batch_bins(mode, bins, shape_files, longest(args) if mode == "train" else None)


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


def load_trained_model(experiment: Path, args: argparse.Namespace) -> TransferEnhancementModel:
    """Load a trained model with its losses, in evaluation mode.

    Args:
        experiment: training folder with `valid.loss_se.best.pth`.
        args: its config.yaml.

    Raises:
        CmktError: the best model is missing.
    """
    return load_best(TransferEnhancementTask.build_bare_model(args), experiment)
