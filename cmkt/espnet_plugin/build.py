"""Build an enhancement model from its config.yaml without the ESPnet task.

`espnet2.tasks.enh` imports the trainer, every separator and `transformers` (9 to 19 s); export and
enhancement need one encoder, one separator and one decoder.
"""

import importlib
import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path

from cmkt.errors import CmktError

ENCODERS = {
    "stft": "espnet2.enh.encoder.stft_encoder:STFTEncoder",
    "conv": "espnet2.enh.encoder.conv_encoder:ConvEncoder",
    "same": "espnet2.enh.encoder.null_encoder:NullEncoder",
}
DECODERS = {
    "stft": "espnet2.enh.decoder.stft_decoder:STFTDecoder",
    "conv": "espnet2.enh.decoder.conv_decoder:ConvDecoder",
    "same": "espnet2.enh.decoder.null_decoder:NullDecoder",
}
# ESPnet's names, less `tcn_nomask`, which only serves joint diarisation.
SEPARATORS = {
    "asteroid": "espnet2.enh.separator.asteroid_models:AsteroidModel_Converter",
    "bsrnn": "espnet2.enh.separator.bsrnn_separator:BSRNNSeparator",
    "conformer": "espnet2.enh.separator.conformer_separator:ConformerSeparator",
    "dan": "espnet2.enh.separator.dan_separator:DANSeparator",
    "dc_crn": "espnet2.enh.separator.dc_crn_separator:DC_CRNSeparator",
    "dccrn": "espnet2.enh.separator.dccrn_separator:DCCRNSeparator",
    "dpcl": "espnet2.enh.separator.dpcl_separator:DPCLSeparator",
    "dpcl_e2e": "espnet2.enh.separator.dpcl_e2e_separator:DPCLE2ESeparator",
    "dprnn": "espnet2.enh.separator.dprnn_separator:DPRNNSeparator",
    "dptnet": "espnet2.enh.separator.dptnet_separator:DPTNetSeparator",
    "fasnet": "espnet2.enh.separator.fasnet_separator:FaSNetSeparator",
    "ineube": "espnet2.enh.separator.ineube_separator:iNeuBe",
    "rnn": "espnet2.enh.separator.rnn_separator:RNNSeparator",
    "skim": "espnet2.enh.separator.skim_separator:SkiMSeparator",
    "svoice": "espnet2.enh.separator.svoice_separator:SVoiceSeparator",
    "tcn": "espnet2.enh.separator.tcn_separator:TCNSeparator",
    "tfgridnet": "espnet2.enh.separator.tfgridnet_separator:TFGridNet",
    "tfgridnetv2": "espnet2.enh.separator.tfgridnetv2_separator:TFGridNetV2",
    "tfgridnetv3": "espnet2.enh.separator.tfgridnetv3_separator:TFGridNetV3",
    "transformer": "espnet2.enh.separator.transformer_separator:TransformerSeparator",
    "uses": "espnet2.enh.separator.uses_separator:USESSeparator",
    "uses2": "espnet2.enh.separator.uses2_separator:USES2Separator",
    "wpe_beamformer": "espnet2.enh.separator.neural_beamformer:NeuralBeamformer",
}

# Ours. An export of one needs cmkt to run, since stock ESPnet does not know these names.
OWN_SEPARATORS = {
    "blstm_sum": "cmkt.espnet_plugin.separators.blstm_sum:BLSTMSumSeparator",
    "dense_dual_path": "cmkt.espnet_plugin.separators.dense_dual_path:DenseDualPathSeparator",
    "gtcrn": "cmkt.espnet_plugin.separators.gtcrn:GTCRNSeparator",
    "mp_senet": "cmkt.espnet_plugin.separators.mp_senet:MPSENetSeparator",
}
# What may stand in a configuration.
PARTS = {"encoder": ENCODERS, "separator": SEPARATORS | OWN_SEPARATORS, "decoder": DECODERS}
# Losses of ours (spectral_criterions.py), which no enhancement needs.
OWN_CRITERIONS = ("compressed_magnitude", "compressed_complex", "anti_wrapping_phase",
                  "consistency", "relative_l1")  # fmt: skip


def find_class(kind: str, name: str | None, table: dict[str, str]) -> type:
    """Import a class by its ESPnet name.

    Args:
        kind: the config key, for example `separator`.
        name: its value, for example `rnn`.
        table: {name: "module:Class"}.

    Raises:
        CmktError: a name that is not in the table, or a part that this ESPnet does not have.
    """
    if name not in table:
        raise CmktError(f"{kind}: no such choice: {name!r}", remedy=f"known: {', '.join(table)}")
    module, _, cls = table[name].partition(":")
    try:
        with redirect_stdout(io.StringIO()):  # ESPnet tells what it would import as well
            return getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise CmktError(
            f"{kind} {name} cannot be imported: {error}", remedy="install another ESPnet version"
        ) from error


def build_enhancement_model(config: dict):
    """Build the model that `EnhancementTask.build_model` builds, without its training losses.

    Args:
        config: config.yaml of an experiment or an export; read are `encoder`, `separator`,
            `decoder`, their `*_conf`, `model_conf`, and `feedback` of an export that has a
            feedback adapter.

    Returns:
        an `ESPnetEnhancementModel` with random weights and no loss: it can enhance, not train.
        Parameter names equal those of the task's model.

    Raises:
        CmktError: an unknown part, or settings that the part does not take.
    """
    from typeguard import TypeCheckError

    if config.get("diffusion_model") is not None:
        raise CmktError("diffusion models cannot be built", remedy="train one with a separator")
    if config.get("feedback"):
        config = {**config, "separator": config["separator"].removeprefix("cmkt_")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about ESPnet's own code
        from espnet2.enh.espnet_model import ESPnetEnhancementModel

        classes = [find_class(kind, config.get(kind), table) for kind, table in PARTS.items()]
    confs = [config.get(f"{kind}_conf") or {} for kind in PARTS]
    try:
        encoder = classes[0](**confs[0])
        separator = classes[1](encoder.output_dim, **confs[1])
        if config.get("feedback"):
            _add_feedback(encoder, separator, config)
        decoder = classes[2](**confs[2])
        return ESPnetEnhancementModel(
            encoder=encoder,
            separator=separator,
            decoder=decoder,
            mask_module=None,
            loss_wrappers=None,
            **(config.get("model_conf") or {}),
        )
    except (
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        NotImplementedError,
        TypeCheckError,
    ) as error:
        raise CmktError(
            f"the model cannot be built: {error}",
            remedy="the configuration may come from another version of ESPnet",
        ) from error


def can_stream(separator) -> bool:
    """Tell whether a separator has a method of its own for frame after frame."""
    from espnet2.enh.separator.abs_separator import AbsSeparator

    return type(separator).forward_streaming is not AbsSeparator.forward_streaming


def _add_feedback(encoder, separator, config: dict) -> None:
    """Put the feedback adapter where it was in training (the key `feedback` of an export)."""
    from cmkt.espnet_plugin.feedback import attach_feedback
    from cmkt.espnet_plugin.taps import find_taps

    conf = dict(config["feedback"])
    (tap,) = find_taps(config["separator"], separator, conf.pop("tap"))
    attach_feedback(encoder, separator, tap, conf)


def load_training_model(experiment: str | Path):
    """Load a trained model with its transfer part, for looking into it.

    Args:
        experiment: ESPnet experiment folder with config.yaml and `valid.loss_se.best.pth`.

    Returns:
        a `TransferEnhancementModel` in evaluation mode.

    Raises:
        CmktError: the best model is missing.
    """
    import yaml

    from cmkt.espnet_plugin.model import add_transfer

    config = yaml.safe_load((Path(experiment) / "config.yaml").read_text(encoding="utf-8"))
    conf = config["transfer_conf"] if config.get("transfer") == "cmkt" else None
    model_conf = config.get("model_conf") or {}
    model = build_enhancement_model(config)
    model = add_transfer(model, config["separator"], conf, model_conf, config["sample_rate"])
    return load_best(model, Path(experiment))


def load_best(model, experiment: Path):
    """Load the best weights of a training into its model, and return it in evaluation mode.

    Raises:
        CmktError: they are missing.
    """
    import torch

    weights = experiment / "valid.loss_se.best.pth"
    if not weights.exists():
        raise CmktError("no trained model", weights, remedy="run stage 5 to its end")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
    return model.eval()
