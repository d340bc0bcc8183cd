"""`cmkt <verb>`: parses the command line, imports the verb's module, makes one call.

A verb's module offers `add_arguments(parser)` and `run(args)`. Verbs whose module sets
`PASS_THROUGH = True` take further options, which reach `run(args, rest)`.
"""

import argparse
import errno
import importlib
import sys

from cmkt import __version__
from cmkt.errors import CmktError

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
    "train": ("cmkt.espnet_plugin.train", "collect statistics and train (stages 4 and 5)"),
    "export": ("cmkt.enhance.export", "write a plain ESPnet model, no text side (stage 6)"),
    "enhance": ("cmkt.enhance.enhance", "enhance files, folders or a wav.scp (stage 7)"),
    "score": ("cmkt.evaluate.score", "PESQ, STOI, ESTOI, SI-SNR, SNR (stage 8)"),
    "report": ("cmkt.evaluate.report", "tables and plots of all scores (stage 9)"),
}


def usage() -> str:
    """Return the text of `cmkt --help`."""
    lines = [f"  {verb:<15}{summary}" for verb, (_, summary) in VERBS.items()]
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
    try:
        if getattr(module, "PASS_THROUGH", False):
            args, unknown = parser.parse_known_args(rest)
            module.run(args, unknown)
        else:
            module.run(parser.parse_args(rest))
    except CmktError as error:
        print(f"cmkt {verb}: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "the output folder"
        print(
            f"cmkt {verb}: error: {where}: no space left on the device "
            "(free some and run the same command again)",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"cmkt {verb}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
