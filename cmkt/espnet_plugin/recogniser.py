"""A speech recogniser that was trained with ESPnet."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from cmkt.errors import CmktError

# Which of an experiment's checkpoints to take, the best first.
WEIGHTS = ("valid.acc.ave*.pth", "valid.*.ave*.pth", "valid.acc.best.pth", "valid.*.best.pth")


def find_espnet_model(path: str | Path) -> dict[str, Path]:
    """Find the files of a recogniser.

    Args:
        path: an experiment folder (config.yaml and `valid.*.pth`), one of its .pth files, or a
            folder as the ESPnet model zoo packs it (meta.yaml).

    Returns:
        arguments of `espnet2.bin.asr_inference.Speech2Text`.

    Raises:
        CmktError: a file is missing.
    """
    path = Path(path).expanduser().resolve()
    if path.suffix == ".pth":
        files = {"asr_train_config": path.parent / "config.yaml", "asr_model_file": path}
    elif (path / "config.yaml").is_file():
        weights = (file for pattern in WEIGHTS for file in sorted(path.glob(pattern)))
        files = {
            "asr_train_config": path / "config.yaml",
            "asr_model_file": next(weights, path / WEIGHTS[0]),
        }
    elif (path / "meta.yaml").is_file():
        packed = yaml.safe_load((path / "meta.yaml").read_text(encoding="utf-8"))
        names = {**packed.get("files", {}), **packed.get("yaml_files", {})}
        files = {argument: path / name for argument, name in names.items()}
    else:
        files = {"asr_train_config": path / "config.yaml"}
    for file in files.values():
        if not file.is_file():
            raise CmktError("no such file of an ESPnet recogniser", file, remedy="check the folder")
    return files


def _recipe_folder(config: Path) -> Path:
    """Return the folder that the relative paths in a training configuration start from."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    named = [values.get("bpemodel"), values.get("token_list")]
    named.append((values.get("normalize_conf") or {}).get("stats_file"))
    named = [name for name in named if isinstance(name, str)]
    for folder in (*config.parents, Path.cwd()):
        if all((folder / name).exists() for name in named):
            return folder
    raise CmktError(
        f"it names files that are not there: {', '.join(named)}",
        config,
        remedy="keep the experiment inside its recipe, or copy these files along",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about ESPnet's own code
        yield


class EspnetRecogniser:
    """Decodes with ESPnet's beam search and its default settings.

    Args:
        path: see `find_espnet_model`.
        device: a torch device.

    Raises:
        CmktError: a file is missing, or the model cannot be built.
    """

    def __init__(self, path: str | Path, device: str = "cpu"):
        files = find_espnet_model(path)
        config = files["asr_train_config"]
        try:
            with contextlib.chdir(_recipe_folder(config)), _quiet():
                from espnet2.bin.asr_inference import Speech2Text

                self.model = Speech2Text(**files, device=device)
        except CmktError:
            raise
        except Exception as error:  # of many kinds: the configuration names the classes to build
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise CmktError(
                f"ESPnet cannot load the recogniser: {reason}",
                config,
                remedy="the model may come from another version of ESPnet",
            ) from error
        fs = (self.model.asr_train_args.frontend_conf or {}).get("fs", 16000)
        # ESPnet takes 16k for 16000.
        self.fs = int(float(fs[:-1]) * 1000) if str(fs).endswith("k") else int(fs)

    def __call__(self, audio: np.ndarray) -> str:
        """Return the text of audio (N,); an empty one if it is shorter than the model can take."""
        from espnet2.bin.asr_inference import TooShortUttError

        with _quiet():
            try:
                hypotheses = self.model(audio)
            except TooShortUttError:
                return ""
        return (hypotheses[0][0] or "") if hypotheses else ""
