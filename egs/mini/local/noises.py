"""Noise made on the spot, by family; some families are kept for the test set alone."""

import numpy as np
from scipy.signal import butter, lfilter

TRAIN_FAMILIES = ["babble", "coloured", "modulated", "hum", "clicks"]
TEST_FAMILIES = ["babble", "machine", "wind"]


def coloured(generator: np.random.Generator, count: int, rate: int) -> np.ndarray:
    """White, pink or brown noise: a spectrum that falls by 0, 3 or 6 dB per octave."""
    spectrum = np.fft.rfft(generator.normal(size=count))
    frequency = np.maximum(np.fft.rfftfreq(count, 1 / rate), 20)
    return np.fft.irfft(spectrum / frequency ** (generator.choice([0.0, 0.5, 1.0])), count)


def modulated(generator: np.random.Generator, count: int, rate: int) -> np.ndarray:
    """Coloured noise whose level moves at 0.5 to 8 Hz."""
    time = np.arange(count) / rate
    swing = 1 + 0.9 * np.sin(2 * np.pi * generator.uniform(0.5, 8) * time)
    return coloured(generator, count, rate) * swing


def hum(generator: np.random.Generator, count: int, rate: int) -> np.ndarray:
    """Mains hum with harmonics that decay, over a little hiss."""
    time = np.arange(count) / rate
    mains = generator.choice([50.0, 60.0]) * generator.uniform(0.995, 1.005)
    phases = generator.uniform(0, 2 * np.pi, 20)
    tones = sum(np.sin(2 * np.pi * mains * k * time + phases[k - 1]) / k for k in range(1, 21))
    return tones + 0.1 * generator.normal(size=count)


def clicks(generator: np.random.Generator, count: int, rate: int) -> np.ndarray:
    """Short decaying bursts at random times, over a faint hiss."""
    impulses = np.zeros(count)
    number = max(int(count / rate * generator.uniform(6, 20)), 1)
    impulses[generator.integers(0, count, number)] = generator.normal(size=number)
    pole = generator.uniform(0.95, 0.995)
    ring = 2 * pole * np.cos(2 * np.pi * generator.uniform(500, 4000) / rate)
    return lfilter([1], [1, -ring, pole**2], impulses) + 0.01 * generator.normal(size=count)


def machine(generator: np.random.Generator, count: int, rate: int) -> np.ndarray:
    """Test only: rhythmic strokes of resonant noise, with a whine."""
    time = np.arange(count) / rate
    stroke = np.exp(-12 * ((time * generator.uniform(2, 5)) % 1))
    low, high = sorted(generator.uniform(300, 5000, 2))
    body = lfilter(*butter(2, [low, high + 200], "band", fs=rate), generator.normal(size=count))
    whine = np.sin(2 * np.pi * generator.uniform(800, 2500) * time)
    return body * stroke / body.std() + 0.15 * whine


def wind(generator: np.random.Generator, count: int, rate: int) -> np.ndarray:
    """Test only: low noise in slow irregular gusts."""
    body = lfilter(*butter(2, generator.uniform(300, 900), fs=rate), generator.normal(size=count))
    gusts = np.interp(
        np.arange(count), np.linspace(0, count, count // rate + 2),
        generator.uniform(0.1, 1, count // rate + 2),
    )  # fmt: skip
    return body / body.std() * gusts + 0.02 * generator.normal(size=count)


MAKERS = {f.__name__: f for f in (coloured, modulated, hum, clicks, machine, wind)}
