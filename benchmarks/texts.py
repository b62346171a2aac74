"""Texts to measure on, as token ids: those in the repository, one's own, or a hub's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .context import ROOT

TEXTS = ROOT / "benchmarks" / "texts"
HUB = "hf:"
"""``hf:NAME``, ``hf:NAME@SPLIT`` or ``hf:NAME@CONFIG@SPLIT`` is a data set of a hub."""


def bundled() -> list[str]:
    """Names of the texts in the repository."""
    return sorted(path.name for path in TEXTS.iterdir() if path.is_dir())


def read(name: str) -> list[str]:
    """The texts that a name stands for, each to be cut into documents by itself.

    Args:
        name: of a bundled text, a file, a folder of ``.txt`` files, or a data set of a hub.

    Raises:
        ValueError: it is none of them.
    """
    if name.startswith(HUB):
        return ["\n".join(_of_hub(name.removeprefix(HUB)))]
    path = TEXTS / name if name in bundled() else Path(name)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"--tasks {name!r} is no text; allowed: {', '.join(bundled())}, a text file, a folder "
            f"of .txt files, or {HUB}NAME[@CONFIG][@SPLIT] for a data set of a hub"
        )
    return [file.read_text(encoding="utf-8") for file in files]


def documents(name: str, model: str, num_tokens: int) -> list[list[int]]:
    """Documents of ``num_tokens`` tokens, the model's BOS in front.

    The first of each text come first, then the second of each, and so on; none overlap.

    Raises:
        ValueError: there is no such text, or none is long enough.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = num_tokens - len(bos)
    found = []
    for number, text in enumerate(read(name)):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for i, start in enumerate(range(0, len(ids) - width + 1, width)):
            found.append((i, number, bos + ids[start : start + width]))
    if not found:
        raise ValueError(f"--tasks {name!r} has no text of {num_tokens} tokens (--num-tokens)")
    return [document for _, _, document in sorted(found)]


def _of_hub(name: str) -> Iterable[str]:
    """The rows of a data set's column ``text``."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"--tasks {HUB}{name} needs the package datasets") from error
    name, *rest = name.split("@")
    split = rest.pop() if rest else "test"
    rows: Iterable[str] = load_dataset(name, *rest, split=split)["text"]
    return rows
