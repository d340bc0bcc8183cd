"""An ESPnet enhancement model with cross-modality transfer in training.

The enhancement part keeps its class, its parameter names and its initialisation; all that is
ours lies under the prefix `transfer.`, which the export drops.
"""

import torch
from espnet2.enh.espnet_model import ESPnetEnhancementModel
from espnet2.torch_utils.device_funcs import force_gatherable

from cmkt.errors import CmktError
from cmkt.espnet_plugin.taps import Tap, find_tap, listen, tap_width
from cmkt.transfer import CrossModalTransfer

CONF_KEYS = ("tap", "alpha", "reduction", "standardise", "pca", "alignment", "misalignment",
             "linguistic_dim")  # fmt: skip


class TransferEnhancementModel(ESPnetEnhancementModel):
    """`ESPnetEnhancementModel` plus the transfer loss L = alpha L_SE + (1 - alpha) L_CMA.

    Args:
        transfer: alignment, misalignment and loss; None trains the enhancement model alone.
        tap: where the acoustic sequence is taken from the separator.
        **parts: the arguments of `ESPnetEnhancementModel`.
    """

    def __init__(self, transfer: CrossModalTransfer | None, tap: Tap | None, **parts):
        super().__init__(**parts)
        self.transfer = transfer
        self.tap = tap

    def forward(
        self,
        speech_mix: torch.Tensor,
        speech_mix_lengths: torch.Tensor | None = None,
        linguistic: torch.Tensor | None = None,
        linguistic_lengths: torch.Tensor | None = None,
        **kwargs,
    ):
        """Compute the loss of one batch.

        Args:
            speech_mix: (B, N) noisy samples.
            speech_mix_lengths: (B,) valid samples.
            linguistic: (B, T_t, D_t) token embeddings; a row of zeros means "no transcript".
            linguistic_lengths: (B,) valid tokens.
            **kwargs: `speech_ref1` (B, N) and the rest that ESPnet's model takes.

        Returns:
            loss (1,), statistics (`loss_se`, `loss_cma`, and in evaluation `cos_matched`,
            `cos_mismatched`, `transfer_gap`), weight (1,).
        """
        if self.transfer is None or linguistic is None:
            loss, stats, weight = super().forward(speech_mix, speech_mix_lengths, **kwargs)
            stats["loss_se"] = stats["loss"]
            return loss, stats, weight
        with listen(self.separator, self.tap) as heard:
            loss_se, stats, weight = super().forward(speech_mix, speech_mix_lengths, **kwargs)
        batch = (heard.sequence, heard.lengths, linguistic, linguistic_lengths)
        loss_cma = self.transfer(*batch)
        loss = self.transfer.combine(loss_se, loss_cma)
        ours = {"loss": loss.detach(), "loss_se": loss_se.detach(), "loss_cma": loss_cma.detach()}
        if not self.training:
            ours.update(self.transfer.diagnostics(*batch))
        loss, ours = force_gatherable((loss, ours), loss.device)
        return loss, {**stats, **ours}, weight

    @torch.no_grad()
    def attention(self, speech: torch.Tensor, linguistic: torch.Tensor) -> torch.Tensor:
        """Return which frames each token was aligned with.

        Args:
            speech: (1, N) noisy samples.
            linguistic: (1, T_t, D_t) token embeddings.

        Returns:
            weights (T_t, T_a), each row sums to 1.
        """
        if self.normalize_variance:
            speech = speech / speech.std(dim=1, keepdim=True)
        lengths = torch.tensor([speech.shape[1]], device=speech.device)
        with listen(self.separator, self.tap) as heard:
            self.forward_enhance(speech, lengths, {})
        tokens = torch.tensor([linguistic.shape[1]], device=speech.device)
        targets = self.transfer.targets(linguistic)
        _, weights = self.transfer.alignment(
            heard.sequence, heard.lengths, targets, tokens, need_weights=True
        )
        return weights[0]


def add_transfer(
    model: ESPnetEnhancementModel, separator_name: str, conf: dict | None, model_conf: dict
) -> TransferEnhancementModel:
    """Rebuild an enhancement model as our class, with the same parts.

    Args:
        model: a freshly built stock model.
        separator_name: as in the YAML, for example `rnn`.
        conf: `transfer_conf` of the YAML; None for no transfer. With alpha = 1 the text could
            not matter, so nothing of ours is built and training equals stock `enh_train`.
        model_conf: `model_conf` of the YAML.

    Raises:
        CmktError: an unknown key, a wrong value.
    """
    transfer, tap = None, None
    if conf is not None:
        conf = dict(conf)
        unknown = sorted(set(conf) - set(CONF_KEYS))
        if unknown:
            raise CmktError(
                f"transfer_conf: unknown key {unknown[0]}", remedy=f"known: {', '.join(CONF_KEYS)}"
            )
        tap = find_tap(separator_name, conf.pop("tap", "auto"))
        linguistic_dim = conf.pop("linguistic_dim", None)
        if not isinstance(linguistic_dim, int):
            raise CmktError(
                "transfer_conf.linguistic_dim is not set to a number",
                remedy="give the store with --llm_dir, which sets it, or set it in the YAML",
            )
        width = tap_width(model.encoder, model.separator, tap)
        try:
            transfer = CrossModalTransfer(width, linguistic_dim, **conf)
        except (TypeError, ValueError) as error:
            raise CmktError(f"transfer_conf: {error}") from error
        if transfer.alpha == 1:
            transfer, tap = None, None
    return TransferEnhancementModel(
        transfer=transfer,
        tap=tap,
        encoder=model.encoder,
        separator=model.separator,
        decoder=model.decoder,
        mask_module=model.mask_module,
        loss_wrappers=model.loss_wrappers,
        **model_conf,
    )
