"""Every way to align acoustic frames with text tokens, by its name in the YAML."""

import importlib

from torch import nn

from cmkt.transfer.settings import build_part, choice

ALIGNMENTS = {
    "transformer": "transformer:CrossModalityTransformer",
    "sinkhorn": "transport:Sinkhorn",
    "temporal_order": "temporal_order:TemporalOrderTransport",
    "unbalanced": "unbalanced:UnbalancedTransport",
    "gromov_wasserstein": "gromov_wasserstein:FusedGromovWasserstein",
    "integrate_and_fire": "integrate_and_fire:IntegrateAndFire",
    "ctc": "ctc:MonotonicCTC",
}


def build_alignment(
    conf: dict | None, acoustic_dim: int, linguistic_dim: int, vocabulary: int | None = None
) -> nn.Module:
    """Build an alignment.

    Args:
        conf: `type`, a key of `ALIGNMENTS` (default `transformer`), and the settings of that class.
        acoustic_dim: D_a, width of the acoustic sequence.
        linguistic_dim: D_t, width of the token embeddings.
        vocabulary: how many different token ids there are, for `ctc`.

    Raises:
        ValueError: an unknown type or key (the nearest is named), or a wrong value.
    """
    if not isinstance(conf, dict | None):
        raise ValueError(f"alignment must be a mapping, not {conf!r}")
    conf = dict(conf or {})
    kind = choice("alignment.type", conf.pop("type", "transformer"), ALIGNMENTS)
    module, _, name = ALIGNMENTS[kind].partition(":")
    if kind == "ctc":
        conf = {"vocabulary": vocabulary, **conf}
    alignment = getattr(importlib.import_module(f"cmkt.transfer.alignment.{module}"), name)
    return build_part(alignment, f"alignment ({kind})", conf, acoustic_dim, linguistic_dim)
