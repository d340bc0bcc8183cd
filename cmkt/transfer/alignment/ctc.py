"""Alignment by a CTC head: which frames spell a token, in the order of the text."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from cmkt.transfer.alignment.base import Aligned, Alignment, Inputs
from cmkt.transfer.sequences import lengths_to_mask
from cmkt.transfer.settings import whole


def posteriors(
    log_probs: torch.Tensor, frame_lengths: torch.Tensor, token_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find out which frames belong to which token, over all CTC paths of a known text.

    The forward-backward algorithm is that of torch's `ctc_loss`: the gradient of the loss with
    respect to scores is their softmax minus the posteriors. Each place in the text is a symbol of
    its own, which tells the same token at two places apart.

    Args:
        log_probs: (B, T_a, 1 + T_t) of the blank and of each token of the text.
        frame_lengths: (B,) valid frames, at least 1 and at least as many as tokens.
        token_lengths: (B,) valid tokens.

    Returns:
        the negative log-likelihood of the text (B,), and the posteriors (B, T_a, 1 + T_t), which
        sum to 1 in each valid frame; both without gradient. As precise as the gradient of
        `ctc_loss` in float32: of 4000 frames and 512 tokens some per cent end up elsewhere.
    """
    # Evaluation may run without gradients or in inference mode, and a gradient is needed here.
    with torch.inference_mode(False), torch.enable_grad():
        scores = log_probs.detach().clone().requires_grad_()
        frame_lengths, token_lengths = frame_lengths.clone(), token_lengths.clone()
        places = torch.arange(1, scores.shape[2], device=scores.device).expand(len(scores), -1)
        normalised = scores.log_softmax(-1)
        nll = F.ctc_loss(
            normalised.transpose(0, 1), places, frame_lengths, token_lengths, reduction="none"
        )
        (gradient,) = torch.autograd.grad(nll.sum(), scores)
        normalised = normalised.detach()
    valid = lengths_to_mask(frame_lengths, log_probs.shape[1])
    offset = (log_probs[..., 0] - normalised[..., 0]).detach()  # (B, T_a), the same for all places
    shares = (normalised.exp() - gradient).clamp(min=0) * valid[..., None]
    return nll.detach() - (offset * valid).sum(-1), shares


class MonotonicCTC(Alignment):
    """Make zhat of the frames that a CTC head assigns to each token.

    Connectionist temporal classification: Graves et al., ICML 2006. The head gives each frame
    scores of all tokens and of the blank. Given the text, the posteriors of all monotone paths say
    how likely a frame belongs to each place in the text, and a token is the mean of the frames,
    weighted by its posteriors. Frames of the blank belong to no token. A best path (Viterbi) would
    give hard segments, but need a Python loop over the frames. The text chooses the frames, but
    zhat is made of frames only; no gradient goes through the choice, the head learns by `loss`.

    The loss is the negative log-likelihood of the text, divided by T_t, since it is added to a
    loss per token. It equals `torch.nn.functional.ctc_loss`, except that the same token twice in a
    row needs no blank in between: their places tell the two apart.

    An utterance with more tokens than frames, or with a token id below 0, has no loss, and uniform
    weights. Time and memory grow with T_a (vocabulary + 1): beside the transformer, forward and
    backward take as long with 500 tokens and seven times as long with 5000
    (benchmarks/alignment.py).

    Args:
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        vocabulary: how many tokens there are; ids are 0 ... vocabulary - 1.
        width: width inside.

    Raises:
        ValueError: a value of the wrong type or outside its range.
    """

    def __init__(self, acoustic_dim: int, linguistic_dim: int, vocabulary: int, width: int = 128):
        super().__init__()
        self.vocabulary = whole("alignment.vocabulary", vocabulary, 1)
        whole("alignment.width", width, 1)
        self.from_acoustic = nn.Sequential(
            nn.LayerNorm(acoustic_dim), nn.Linear(acoustic_dim, width)
        )
        self.head = nn.Linear(width, vocabulary + 1)  # the blank is the last
        self.to_text = nn.Linear(width, linguistic_dim)
        self._warned = False

    def align(self, inputs: Inputs, need_weights: bool) -> Aligned:
        """Align; `loss` is the CTC loss per token.

        Raises:
            ValueError: no token ids, or an id that is not in the vocabulary.
        """
        ids, fits = self._read(inputs)
        frames = self.from_acoustic(inputs.acoustic)
        # Of the vocabulary only the sum is wanted, and the scores of this text and the blank.
        rows = F.pad(ids, (1, 0), value=self.vocabulary)  # (B, 1 + T_t)
        towards = F.embedding(rows, self.head.weight).transpose(1, 2)  # (B, width, 1 + T_t)
        scores = torch.baddbmm(self.head.bias[rows][:, None], frames, towards)
        log_probs = scores - self.head(frames).logsumexp(-1, keepdim=True)
        # What does not fit is given a path all the same, which is then left out.
        lengths = torch.where(fits, inputs.frame_lengths, 1), inputs.token_lengths * fits
        nll, shares = posteriors(log_probs, *lengths)
        shares = shares * fits[:, None, None]  # (B, T_a, 1 + T_t)
        # nll and this expectation over the paths have the same gradient; they differ by the
        # entropy of the paths.
        expected = -(shares * log_probs).sum((1, 2))
        loss = expected + (nll * fits - expected).detach()

        weights = torch.where(fits[:, None, None], shares[..., 1:].transpose(1, 2), 1.0)
        weights = weights * inputs.tokens[:, :, None] * inputs.frames[:, None]  # (B, T_t, T_a)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        return Aligned(
            zhat=self.to_text(weights @ frames),
            weights=weights if need_weights else None,
            loss=loss / inputs.token_lengths.clamp(min=1),
        )

    def _read(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids (B, T_t) that are all in the vocabulary, and which utterances fit (B,)."""
        shape, token_ids = inputs.text.shape[:2], inputs.token_ids
        if token_ids is None:
            if inputs.token_lengths.any():
                raise ValueError("alignment ctc needs token ids beside the text")
            token_ids = inputs.text.new_zeros(shape)
        if token_ids.shape != shape:
            raise ValueError(
                f"alignment ctc: token ids of shape {tuple(token_ids.shape)} for a text of "
                f"{tuple(shape)}"
            )
        ids = token_ids.to(inputs.tokens.device).long().masked_fill(~inputs.tokens, 0)
        if (ids >= self.vocabulary).any():
            raise ValueError(
                f"alignment ctc: token id {int(ids.max())} is not below alignment.vocabulary "
                f"{self.vocabulary}"
            )
        known = (ids >= 0).all(-1)
        too_long = known & (inputs.frame_lengths < inputs.token_lengths)
        # Evaluation also pairs a text with the frames of another utterance.
        if self.training and not self._warned and too_long.any():
            self._warned = True
            warnings.warn(
                "alignment ctc: an utterance with fewer frames than tokens has no loss",
                stacklevel=3,
            )
        return ids.clamp(min=0), known & ~too_long & (inputs.token_lengths > 0)
