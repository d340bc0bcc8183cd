"""An ESPnet enhancement model with cross-modality transfer in training.

The enhancement part keeps its class, its parameter names and its initialisation; all that only
training needs lies under the prefix `transfer.`, which the export drops.
"""

from collections.abc import Sequence

import torch
from espnet2.enh.espnet_model import ESPnetEnhancementModel
from espnet2.torch_utils.device_funcs import force_gatherable

from cmkt.errors import CmktError
from cmkt.espnet_plugin.feedback import FEEDBACK_TAPS, attach_feedback
from cmkt.espnet_plugin.listening import Listener, find_listeners, listen
from cmkt.espnet_plugin.taps import find_taps
from cmkt.transfer import CrossModalTransfer
from cmkt.transfer.alpha import build_alpha
from cmkt.transfer.settings import unknown_key

CONF_KEYS = ("tap", "pooling", "feedback", "alpha", "loss", "reduction", "standardise", "pca",
             "alignment", "misalignment", "linguistic_dim", "vocabulary")  # fmt: skip


class TransferEnhancementModel(ESPnetEnhancementModel):
    """`ESPnetEnhancementModel` plus the transfer loss L = alpha L_SE + (1 - alpha) L_CMA.

    Args:
        transfer: alignment, misalignment and loss; None trains the enhancement model alone.
        taps: what the alignment listens to.
        stream: places whose gradients are compared: the taps, or what the adapter is added to.
        **parts: the arguments of `ESPnetEnhancementModel`.
    """

    def __init__(
        self,
        transfer: CrossModalTransfer | None = None,
        taps: Sequence[Listener] = (),
        stream: Sequence[Listener] = (),
        **parts,
    ):
        super().__init__(**parts)
        self.transfer = transfer
        self.taps, self.stream = tuple(taps), tuple(stream)
        self.compare_gradients()

    def forward(
        self,
        speech_mix: torch.Tensor,
        speech_mix_lengths: torch.Tensor | None = None,
        linguistic: torch.Tensor | None = None,
        linguistic_lengths: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        token_ids_lengths: torch.Tensor | None = None,
        **kwargs,
    ):
        """Compute the loss of one batch.

        Args:
            speech_mix: (B, N) noisy samples.
            speech_mix_lengths: (B,) valid samples.
            linguistic: (B, T_t, D_t) token embeddings; a row of zeros means "no transcript".
            linguistic_lengths: (B,) valid tokens.
            token_ids: (B, T_t) which token each is.
            token_ids_lengths: (B,), equals `linguistic_lengths`.
            **kwargs: `speech_ref1` (B, N) and the rest that ESPnet's model takes.

        Returns:
            loss (1,), statistics (`loss_se`, `loss_cma` and its parts, and in evaluation those
            of `CrossModalTransfer.diagnostics`; `gradient_share` once a validation), weight (1,).
        """
        if self.transfer is None or linguistic is None:
            loss, stats, weight = super().forward(speech_mix, speech_mix_lengths, **kwargs)
            stats["loss_se"] = self.enhancement_loss(loss, stats).detach()
            return loss, stats, weight
        if self.training:
            self.compare_gradients()
        compare = self._compare_next and not self.training
        # A recurrent network on a GPU has no backward pass in evaluation unless cuDNN is off.
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() or compare),
            torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not compare),
            listen(self.separator, {*self.taps, *self.stream}) as heard,
        ):
            loss_se, stats, weight = super().forward(speech_mix, speech_mix_lengths, **kwargs)
            batch = (*heard.sequence(self.taps), linguistic, linguistic_lengths)
            loss_cma = self.transfer(*batch, token_ids)
            stream = heard.stream(self.stream)
            loss = self.transfer.combine(loss_se, loss_cma, stream)
        ours = {
            "loss": loss.detach(),
            "loss_se": self.enhancement_loss(loss_se, stats).detach(),
            "loss_cma": loss_cma.detach(),
            **self.transfer.logged,
        }
        if not self.training:
            ours.update(self.transfer.diagnostics(*batch, token_ids))
        if compare:
            self._compare_next = False
            ours["gradient_share"] = self.transfer.gradient_share(loss_se, loss_cma, stream)
        loss, ours = force_gatherable((loss, ours), loss.device)
        return loss, {**stats, **ours}, weight

    def compare_gradients(self) -> None:
        """Let the next batch in evaluation compare the gradients of the two losses.

        Training asks for it, so each validation does it once: it costs a backward pass.
        """
        self._compare_next = True

    def enhancement_loss(self, loss: torch.Tensor, stats: dict) -> torch.Tensor:
        """Return the enhancement loss alone, without the rivals among the criterions.

        Args:
            loss: the weighted sum of all criterions.
            stats: the value of each by name.
        """
        for wrapper in self.loss_wrappers or ():
            if getattr(wrapper.criterion, "is_rival", False):
                loss = loss - wrapper.weight * stats[wrapper.criterion.name].to(loss)
        return loss

    @torch.no_grad()
    def hear(self, speech: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the alignment is given of noisy speech.

        Args:
            speech: (B, N) noisy samples.
            lengths: (B,) valid samples.

        Returns:
            acoustic (B, T_a, D_a) and its valid frames (B,).
        """
        if self.normalize_variance:
            speech = speech / speech.std(dim=1, keepdim=True)
        with listen(self.separator, self.taps) as heard:
            self.forward_enhance(speech, lengths, {})
        return heard.sequence(self.taps)

    def attention(
        self, speech: torch.Tensor, linguistic: torch.Tensor, token_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return which frames each token was aligned with.

        Args:
            speech: (1, N) noisy samples.
            linguistic: (1, T_t, D_t) token embeddings.
            token_ids: (1, T_t), for an alignment that needs them.

        Returns:
            weights (T_t, T_a), each row sums to 1.
        """
        acoustic, frames = self.hear(speech, torch.tensor([speech.shape[1]], device=speech.device))
        tokens = torch.tensor([linguistic.shape[1]], device=speech.device)
        return self.transfer.align(acoustic, frames, linguistic, tokens, token_ids).weights[0]


def add_transfer(
    model: ESPnetEnhancementModel,
    separator_name: str,
    conf: dict | None,
    model_conf: dict,
    sample_rate: int,
) -> TransferEnhancementModel:
    """Rebuild an enhancement model as our class, with the same parts.

    Args:
        model: a freshly built stock model.
        separator_name: as in the YAML, for example `rnn`.
        conf: `transfer_conf` of the YAML; None for no transfer. With alpha = 1 the text could
            not matter, so nothing of ours is built and training equals stock `enh_train`.
        model_conf: `model_conf` of the YAML.
        sample_rate: in Hz; with it, the frames per second at a tap are known.

    Raises:
        CmktError: an unknown key, a wrong value.
    """
    ours = {}
    if conf is not None:
        ours = _transfer_parts(model, separator_name, dict(conf), sample_rate)
    return TransferEnhancementModel(
        encoder=model.encoder,
        separator=model.separator,
        decoder=model.decoder,
        mask_module=model.mask_module,
        loss_wrappers=model.loss_wrappers,
        **ours,
        **model_conf,
    )


def _transfer_parts(
    model: ESPnetEnhancementModel, separator_name: str, conf: dict, sample_rate: int
) -> dict:
    """Build the transfer, and return the arguments of `TransferEnhancementModel` that are ours."""
    for key in conf:
        if key not in CONF_KEYS:
            raise CmktError(f"transfer_conf: {unknown_key(key, CONF_KEYS)}")
    entries, pooling = conf.pop("tap", "auto"), conf.pop("pooling", None)
    linguistic_dim, feedback = conf.pop("linguistic_dim", None), conf.pop("feedback", None)
    if not isinstance(linguistic_dim, int):
        raise CmktError(
            "transfer_conf.linguistic_dim is not set to a number",
            remedy="give the store with --llm_dir, which sets it, or set it in the YAML",
        )
    encoder, separator = model.encoder, model.separator
    try:
        off = build_alpha(conf.get("alpha", 0.9)).is_off
        if off and feedback is None:
            return {}
        taps = find_taps(separator_name, separator, entries)
        if feedback is not None:
            if len(taps) > 1:
                raise ValueError("feedback works on one tap, not on several")
            attach_feedback(encoder, separator, taps[0], feedback)
            if off:  # the adapter alone: the control of its parameters
                return {}
            taps = FEEDBACK_TAPS
        listeners = find_listeners(encoder, separator, taps, pooling, sample_rate)
        heard = stream = listeners
        if feedback is not None:
            heard, stream = listeners[:1], listeners[1:]
        width = sum(listener.width for listener in heard)
        transfer = CrossModalTransfer(width, linguistic_dim, **conf)
    except (TypeError, ValueError) as error:
        raise CmktError(f"transfer_conf: {error}") from error
    return {"transfer": transfer, "taps": heard, "stream": stream}
