"""Noise made on the spot, by family; some families are kept for the test set alone."""

import numpy as np
from espeak import RATE
from scipy.signal import butter, lfilter

# Babble has a recipe for each: how many voices speak at once, and by how much (dB) they differ.
FAMILIES = {
    "train": ["babble", "coloured", "modulated", "hum", "clicks"],
    "valid": ["babble", "coloured", "modulated", "hum", "clicks"],
    "test": ["babble", "machine", "wind"],
}
BABBLE = {"train": (5, 0.0), "valid": (5, 0.0), "test": (3, 6.0)}


def coloured(generator: np.random.Generator, count: int) -> np.ndarray:
    """White, pink or brown noise: a spectrum that falls by 0, 3 or 6 dB per octave."""
    spectrum = np.fft.rfft(generator.normal(size=count))
    frequency = np.maximum(np.fft.rfftfreq(count, 1 / RATE), 20)
    return np.fft.irfft(spectrum / frequency ** generator.choice([0.0, 0.5, 1.0]), count)


def modulated(generator: np.random.Generator, count: int) -> np.ndarray:
    """Coloured noise whose level swings at 0.5 to 8 Hz."""
    time = np.arange(count) / RATE
    swing = 1 + 0.9 * np.sin(2 * np.pi * generator.uniform(0.5, 8) * time)
    return coloured(generator, count) * swing


def hum(generator: np.random.Generator, count: int) -> np.ndarray:
    """Mains hum: 20 harmonics of 50 or 60 Hz that decay, over a little hiss."""
    time = np.arange(count) / RATE
    mains = generator.choice([50.0, 60.0]) * generator.uniform(0.995, 1.005)
    phases = generator.uniform(0, 2 * np.pi, 20)
    tones = sum(np.sin(2 * np.pi * mains * k * time + phases[k - 1]) / k for k in range(1, 21))
    return tones + 0.1 * generator.normal(size=count)


def clicks(generator: np.random.Generator, count: int) -> np.ndarray:
    """Ringing clicks at random times, 6 to 20 a second, over a faint hiss."""
    impulses = np.zeros(count)
    number = max(int(count / RATE * generator.uniform(6, 20)), 1)
    impulses[generator.integers(0, count, number)] = generator.normal(size=number)
    pole = generator.uniform(0.95, 0.995)
    ring = 2 * pole * np.cos(2 * np.pi * generator.uniform(500, 4000) / RATE)
    return lfilter([1], [1, -ring, pole**2], impulses) + 0.01 * generator.normal(size=count)


def machine(generator: np.random.Generator, count: int) -> np.ndarray:
    """Test only: 2 to 5 strokes a second of band-limited noise, with a whine."""
    time = np.arange(count) / RATE
    stroke = np.exp(-12 * ((time * generator.uniform(2, 5)) % 1))
    low, high = sorted(generator.uniform(300, 5000, 2))
    band = butter(2, [low, high + 200], "band", fs=RATE)
    body = lfilter(*band, generator.normal(size=count))
    whine = np.sin(2 * np.pi * generator.uniform(800, 2500) * time)
    return body * stroke / body.std() + 0.15 * whine


def wind(generator: np.random.Generator, count: int) -> np.ndarray:
    """Test only: low-frequency noise in slow irregular gusts."""
    body = lfilter(*butter(2, generator.uniform(300, 900), fs=RATE), generator.normal(size=count))
    knots = count // RATE + 2  # one a second
    gusts = np.interp(
        np.arange(count), np.linspace(0, count, knots), generator.uniform(0.1, 1, knots)
    )
    return body / body.std() * gusts + 0.02 * generator.normal(size=count)


MAKERS = {maker.__name__: maker for maker in (coloured, modulated, hum, clicks, machine, wind)}
