"""The texts in the repository, as token ids."""

from __future__ import annotations

from pathlib import Path

from .context import ROOT

TEXTS = ROOT / "benchmarks" / "texts"


def documents(path: Path, model: str, num_tokens: int) -> list[list[int]]:
    """Documents of ``num_tokens`` tokens from a text file, or from the text files of a folder.

    The first of each file come first, then the second of each, and so on; none overlap.

    Raises:
        ValueError: no file is long enough.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = num_tokens - len(bos)
    found = []
    for number, file in enumerate(sorted(path.glob("*.txt")) if path.is_dir() else [path]):
        ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
        for i, start in enumerate(range(0, len(ids) - width + 1, width)):
            found.append((i, number, bos + ids[start : start + width]))
    if not found:
        raise ValueError(f"no text in {path} has {num_tokens} tokens")
    return [document for _, _, document in sorted(found)]


def corpora() -> list[str]:
    """Names of the folders of texts."""
    return sorted(path.name for path in TEXTS.iterdir() if path.is_dir())
