"""Find how far a model looks back and ahead: which input samples an output sample depends on."""

from dataclasses import dataclass

SECONDS = 1  # of signal on either side of the sample that is looked at
# Where to look, in frames from the middle: of a segment, the first frame looks ahead the furthest.
FRAMES = (0, 20, 40)


@dataclass(frozen=True)
class ReceptiveField:
    """How far an output sample reaches, in seconds.

    Args:
        past: into what came before.
        future: into what comes after; None for both means `SECONDS` or more, which is all
            of an utterance for a model with global normalisation or a backward recurrence.
    """

    past: float | None
    future: float | None

    @property
    def latency(self) -> int | None:
        """Algorithmic latency in ms, rounded up; None for a model that is not causal."""
        return None if self.future is None else -int(-1000 * self.future // 1)


def find_receptive_field(enhance, sample_rate: int, hop: int, window: int) -> ReceptiveField:
    """Differentiate output samples with respect to the input, one after another.

    The samples are the second ones of an analysis window, the first that a tapered window does not
    zero: none looks further ahead. Gradients are in double precision, since those that fade through
    a recurrent network would vanish in single precision.

    Args:
        enhance: differentiable, (1, N) samples to (1, N) samples, float64.
        sample_rate: in Hz.
        hop: samples between two frames.
        window: samples of an analysis window; centred ones start half of it before their hop.
    """
    import torch

    middle = SECONDS * sample_rate
    generator = torch.Generator().manual_seed(0)
    speech = torch.randn(1, 2 * middle, dtype=torch.float64, generator=generator)
    enhanced = enhance(speech.requires_grad_())
    start = middle - middle % hop - window // 2 % hop + 1
    past = future = 0
    for frame in FRAMES:
        sample = start + frame * hop
        (gradient,) = torch.autograd.grad(enhanced[0, sample], speech, retain_graph=True)
        reached = gradient[0].nonzero().flatten()
        first, last = int(reached[0]), int(reached[-1]) + 1
        # Within two windows of an end, the signal has ended and not the model's reach.
        past = None if past is None or first < 2 * window else max(past, sample - first)
        if last > 2 * middle - 2 * window:  # the others would tell nothing more
            return ReceptiveField(past and past / sample_rate, None)
        future = max(future, last - sample)
    return ReceptiveField(past and past / sample_rate, future / sample_rate)


def make_recurrences_remember(model) -> None:
    """Open the forget gates of LSTMs, and close the update gates of GRUs.

    With other weights a gradient may fade until it is 0, and with it the reach that the network
    has. In torch both gates are the second of a bias.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.LSTM | torch.nn.GRU) and module.bias:
            for name, bias in module.named_parameters():
                if name.startswith("bias_ih"):
                    bias.data[module.hidden_size : 2 * module.hidden_size] = 3.0
