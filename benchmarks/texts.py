"""The texts in the repository, as token ids."""

from __future__ import annotations

from pathlib import Path

from .context import ROOT

TEXTS = ROOT / "benchmarks" / "texts"


def documents(folder: Path, model: str, num_tokens: int) -> list[list[int]]:
    """The first ``num_tokens`` tokens of every text file of a folder that has as many.

    Raises:
        ValueError: no file is long enough.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for path in sorted(folder.glob("*.txt")):
        ids = bos + tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        if len(ids) >= num_tokens:
            found.append(ids[:num_tokens])
    if not found:
        raise ValueError(f"no text in {folder} has {num_tokens} tokens")
    return found


def corpora() -> list[str]:
    """Names of the folders of texts."""
    return sorted(path.name for path in TEXTS.iterdir() if path.is_dir())
