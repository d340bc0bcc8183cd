"""`cmkt <verb>`: parses the command line, imports the verb's module, makes one call.

A verb's module offers `add_arguments(parser)` and `run(args)`. Verbs whose module sets
`PASS_THROUGH = True` take further options, which reach `run(args, rest)`.
"""

import argparse
import importlib
import sys

from cmkt import __version__
from cmkt.errors import run_command

VERBS = {
    "new-recipe": ("cmkt.corpus.new_recipe", "write a recipe skeleton for a corpus"),
    "validate": ("cmkt.corpus.validate", "check data directories wholly (end of stage 1)"),
    "simulate-rooms": ("cmkt.corpus.simulate_rooms", "simulate room impulse responses"),
    "mix": ("cmkt.corpus.mix", "mix clean speech with noise (stage 2)"),
    "transcribe": (
        "cmkt.linguistic.transcribe",
        "recognise speech for want of transcripts (stage 3)",
    ),
    "lm-train": ("cmkt.linguistic.lm_train", "train a small language model on text (stage 3)"),
    "embed": ("cmkt.linguistic.embed", "turn transcripts into language-model features (stage 3)"),
    "inspect-store": ("cmkt.linguistic.inspect", "look at language-model features"),
    "train-recogniser": (
        "cmkt.espnet_plugin.train_recogniser",
        "train the recogniser of the mimic loss (stage 4)",
    ),
    "train": ("cmkt.espnet_plugin.train", "collect statistics and train (stages 4 and 5)"),
    "info": ("cmkt.espnet_plugin.info", "parameters and operations of a model"),
    "diagnose": ("cmkt.espnet_plugin.diagnose", "measure what a training learnt of the text"),
    "export": ("cmkt.enhance.export", "write a plain ESPnet model, no text side (stage 6)"),
    "enhance": ("cmkt.enhance.enhance", "enhance files, folders or a wav.scp (stage 7)"),
    "score": ("cmkt.evaluate.score", "PESQ, STOI, ESTOI, SI-SNR, SNR (stage 8)"),
    "report": ("cmkt.evaluate.report", "tables and plots of all scores (stage 9)"),
}


def usage() -> str:
    """Return the text of `cmkt --help`."""
    lines = [f"  {verb:<18}{summary}" for verb, (_, summary) in VERBS.items()]
    return "\n".join(
        [
            "usage: cmkt <verb> [options]",
            "",
            "Speech enhancement that learns from a language model in training only.",
            "",
            *lines,
            "",
            "`cmkt <verb> --help` explains a verb; `./run.sh --help` the whole recipe.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run `cmkt`.

    Args:
        argv: the words after `cmkt`; default: those of this process.

    Returns:
        the exit status: 0, 1 for a named error, 2 for a wrong command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"cmkt {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        print(f"cmkt: no such verb: {verb} (one of: {', '.join(VERBS)})", file=sys.stderr)
        return 2
    module_name, summary = VERBS[verb]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"cmkt {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if getattr(module, "PASS_THROUGH", False):
        parsed = parser.parse_known_args(rest)
    else:
        parsed = (parser.parse_args(rest),)
    return run_command(f"cmkt {verb}", lambda: module.run(*parsed))


if __name__ == "__main__":
    sys.exit(main())
