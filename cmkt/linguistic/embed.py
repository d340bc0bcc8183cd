"""Embed the transcripts of a set with a frozen language model (stage 3).

Writes one float matrix (tokens, dimension) for each utterance that has a transcript. An entry is
made again only when its text or the model's settings have changed. With a local model (a folder
or an installed package) no network is used.
"""

from pathlib import Path

import yaml
from tqdm import tqdm

from cmkt.corpus.datadir import read_table, write_table
from cmkt.errors import CmktError
from cmkt.linguistic.embedder import Embedder, identity, weights_sha256
from cmkt.linguistic.normalise import normalise
from cmkt.linguistic.store import read_meta
from cmkt.stage import Stage

KEYS = {
    "model": str,
    "revision": str,
    "sha256": str,
    "layer": int,
    "normaliser": str,
    "batch_size": int,
}


def add_arguments(parser):
    """Add the options of `cmkt embed`."""
    parser.add_argument("--text", type=Path, required=True, help="Kaldi text file of the set")
    parser.add_argument("--output_dir", type=Path, required=True, help="dump/llm/<tag>/<set>")
    parser.add_argument("--llm_config", type=Path, default=None,
                        help="YAML such as conf/llm/minilm.yaml; options override it")  # fmt: skip
    parser.add_argument("--model", help="hub name, folder, or package:NAME")
    parser.add_argument("--revision", help="hub revision to pin")
    parser.add_argument("--layer", type=int, help="hidden state: 0 input embeddings, -1 last layer")
    parser.add_argument("--normaliser", help="none or lower (default: none)")
    parser.add_argument("--batch_size", type=int, help="utterances at once (default: 32)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def read_config(path: Path | None, overrides: dict) -> dict:
    """Read a language-model YAML and check its keys and types.

    Args:
        path: the YAML; None when everything comes from `overrides`.
        overrides: values that are not None win.

    Raises:
        CmktError: an unknown key or a wrong type, with file and line; no model named.
    """
    conf = {}
    if path is not None:
        if not path.exists():
            raise CmktError("no such language-model configuration", path, remedy="see conf/llm/")
        conf = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        lines = path.read_text(encoding="utf-8").splitlines()
        for key, value in conf.items():
            line = next((n for n, text in enumerate(lines, 1) if text.startswith(f"{key}:")), None)
            if key not in KEYS:
                raise CmktError(f"unknown key {key}", path, line, f"known: {', '.join(KEYS)}")
            if value is not None and type(value) is not KEYS[key]:
                raise CmktError(f"{key} must be {KEYS[key].__name__}, not {value!r}", path, line)
    conf = {**conf, **{key: value for key, value in overrides.items() if value is not None}}
    if not conf.get("model"):
        raise CmktError("no language model named", path, remedy="set model, or give --model")
    return {"layer": -1, "normaliser": "none", "batch_size": 32, "revision": None, **conf}


def run(args) -> None:
    """Run `cmkt embed`.

    Raises:
        CmktError: bad input, a model that cannot be found, or no transcripts at all.
    """
    overrides = {key: getattr(args, key) for key in
                 ("model", "revision", "layer", "normaliser", "batch_size")}  # fmt: skip
    conf = read_config(args.llm_config, overrides)
    if not args.text.exists():
        raise CmktError(
            "no transcripts", args.text,
            remedy="run stages 1 and 2, or train without transfer: the set has no text",
        )  # fmt: skip
    text = {u: normalise(t, conf["normaliser"]) for u, t in read_table(args.text).items()}
    weights = weights_sha256(conf["model"])
    if conf.get("sha256") and weights != conf["sha256"]:
        raise CmktError(
            f"the weights of {conf['model']} have SHA-256 {weights}, not {conf['sha256']}",
            args.llm_config, remedy="reinstall the model, or correct sha256",
        )  # fmt: skip
    settings = identity(conf)
    stage = Stage(args.output_dir, [], {"settings": settings, "text": text})
    if stage.is_done():
        print(f"{args.output_dir}: up to date")
        return
    kept = _reusable(args.output_dir, settings, text)
    missing = {u: t for u, t in text.items() if u not in kept}
    meta = {"model": conf["model"], "revision": conf["revision"], "layer": conf["layer"]}
    meta |= {"normaliser": conf["normaliser"], "weights": weights, "settings": settings}
    # The model is loaded before anything is written, so a wrong name costs nothing.
    embedder = None
    if missing:
        embedder = Embedder(conf["model"], conf["layer"], conf["revision"], args.device)
        meta |= embedder.describe()
    else:
        old = read_meta(args.output_dir)
        meta |= {key: old[key] for key in ("tokenizer", "dimension")}
    with stage.working_directory() as work:
        _write(work, args.output_dir, embedder, missing, kept, text, meta, conf["batch_size"])


def _reusable(folder: Path, settings: str, text: dict[str, str]) -> dict:
    """Return {utterance: (matrix, tokens)} of an older store whose text and settings agree."""
    if not (folder / "meta.yaml").exists() or read_meta(folder).get("settings") != settings:
        return {}
    import kaldiio

    old_text, tokens = read_table(folder / "text"), read_table(folder / "tokens")
    matrices = kaldiio.load_scp(str(folder / "linguistic.scp"))
    return {u: (matrices[u].copy(), tokens[u].split(" "))
            for u in matrices if text.get(u) == old_text.get(u)}  # fmt: skip


def _write(work, final, embedder, missing, kept, text, meta, batch_size) -> None:
    """Write the store into the working folder; its scp names the final one."""
    import kaldiio

    tokens, offsets, cut, empty = {}, {}, [], []
    ark = work / "linguistic.ark"
    ark.unlink(missing_ok=True)
    with ark.open("wb") as stream:

        def add(utterance, matrix, words):
            stream.write(f"{utterance} ".encode())
            offsets[utterance] = f"{final}/linguistic.ark:{stream.tell()}"
            kaldiio.matio.write_array(stream, matrix.astype("float32"))
            tokens[utterance] = " ".join(words)

        for utterance, (matrix, words) in kept.items():
            add(utterance, matrix, words)
        if missing:
            made = embedder.embed(missing, batch_size)
            for utterance, matrix, words, was_cut in tqdm(
                made, total=len(missing), desc=f"embed {final.name}", unit="utt"
            ):
                if was_cut:
                    cut.append(utterance)
                if len(words) == 0:
                    empty.append(utterance)
                else:
                    add(utterance, matrix, words)
    if not tokens:
        raise CmktError("no transcript has a token", final, remedy="check the text and normaliser")
    for names, what in ((cut, "cut to the model's length"), (empty, "left out: no token in")):
        if names:
            print(f"{final}: {what}: {len(names)} transcripts, for example {names[0]}")
    write_table(work / "tokens", tokens)
    write_table(work / "text", {u: t for u, t in text.items() if t})
    write_table(work / "linguistic.scp", offsets)
    meta["utterances"] = len(tokens)
    (work / "meta.yaml").write_text(yaml.safe_dump(meta, sort_keys=True), encoding="utf-8")
