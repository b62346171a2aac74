"""Reads text documents and turns them into one memory-mapped stream of tokens."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.tokenizer import load_tokenizer, train_tokenizer
from training.wikitext import to_wikitext

WIKITEXT_SHARE = 0.6  # of the encyclopedia articles; the rest stay plain


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    id: str
    text: str

    @property
    def is_article(self) -> bool:
        """Whether it is an encyclopedia article (a book otherwise)."""
        return self.id.startswith("enwiki")


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a .jsonl, .jsonl.xz or .txt file, or of every such file of a folder."""
    if path.is_dir():
        for child in sorted(path.iterdir()):
            if child.name.endswith((".jsonl", ".jsonl.xz", ".txt")):
                yield from read_documents(child)
    elif path.suffix == ".txt":
        yield Document(path.stem, path.read_text(encoding="utf-8"))
    else:
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                yield Document(str(record["id"]), record["text"])


def prepared(document: Document) -> str:
    """The text as it is trained on: a fixed share of the articles takes WikiText's form."""
    if document.is_article:
        digest = int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:4], "big")
        if digest < WIKITEXT_SHARE * 2**32:
            return to_wikitext(document.text)
    return document.text.strip() + "\n"


def sample_for_tokenizer(documents: list[Document], characters: int) -> Iterator[str]:
    """The middle of every document, in proportion to its length, `characters` in total."""
    share = min(1.0, characters / sum(len(document.text) for document in documents))
    for document in documents:
        text = prepared(document)
        size = int(len(text) * share)
        start = (len(text) - size) // 2
        yield text[start : start + size]


def build_corpus(
    paths: list[Path], out: Path, vocab_size: int, seed: int, model: Path | None = None
) -> None:
    """Write tokenizer.json, tokens.bin (uint16, documents shuffled) and corpus.json to `out`.

    The tokenizer is that of `model`, an exported folder, or a new one.
    """
    out.mkdir(parents=True, exist_ok=True)
    documents = list(itertools.chain.from_iterable(map(read_documents, paths)))
    random.Random(seed).shuffle(documents)
    if (out / "tokenizer.json").exists():
        tokenizer = load_tokenizer(out)
    elif model is not None:
        tokenizer = load_tokenizer(model)
        tokenizer.save(str(out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(sample_for_tokenizer(documents, 24_000_000), vocab_size)
        tokenizer.save(str(out / "tokenizer.json"))
    total = 0
    articles = 0
    partial = out / "tokens.bin.partial"
    with partial.open("wb") as stream:
        for start in range(0, len(documents), 64):
            batch = documents[start : start + 64]
            articles += sum(document.is_article for document in batch)
            for ids in encode_all(tokenizer, [prepared(document) for document in batch]):
                stream.write(ids.tobytes())
                total += len(ids)
    partial.replace(out / "tokens.bin")
    facts = {"tokens": total, "articles": articles, "books": len(documents) - articles}
    (out / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.uint16]]:
    """Token ids of each text: BOS in front, EOS behind."""
    eos = tokenizer.token_to_id("<|end|>")
    for encoding in tokenizer.encode_batch(texts):
        yield np.asarray([*encoding.ids, eos], dtype=np.uint16)


def open_tokens(folder: Path) -> NDArray[np.uint16]:
    """The token stream of a corpus folder, [tokens] uint16, memory-mapped."""
    return np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")


def main() -> None:
    """Command line of the corpus builder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files or folders")
    parser.add_argument("--out", type=Path, required=True, help="corpus folder to write")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build_corpus(arguments.texts, arguments.out, arguments.vocab_size, arguments.seed)


if __name__ == "__main__":
    main()
