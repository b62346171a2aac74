"""Held-out loss and pass-key recall, with the full context and with a streaming mask."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.export import load_model
from training.model import Llama, token_losses
from training.tokenizer import load_tokenizer

SINK = 4
WINDOW = 256


def streaming_mask(length: int, device: torch.device) -> Tensor:
    """StreamingLLM's attention: the first `SINK` and the last `WINDOW` tokens.

    [length, length] bool, True = the row's token may look at the column's.
    """
    row = torch.arange(length, device=device)[:, None]
    column = torch.arange(length, device=device)[None, :]
    return (column <= row) & ((column < SINK) | (row - column < WINDOW))


@dataclass(frozen=True)
class TextResult:
    """Perplexities on one text: over all tokens, and over those with more than a window behind."""

    text: str
    context: int
    tokens: int
    full_perplexity: float
    streaming_perplexity: float
    full_perplexity_beyond_window: float
    streaming_perplexity_beyond_window: float

    @property
    def gain(self) -> float:
        """By how much the streaming mask raises the perplexity, in per cent."""
        return 100 * (self.streaming_perplexity / self.full_perplexity - 1)


@dataclass(frozen=True)
class PasskeyResult:
    """Share of documents whose five digits all come out right by greedy decoding."""

    context: int
    documents: int
    full_accuracy: float
    streaming_accuracy: float


def windows(tokenizer: Tokenizer, text: str, length: int, limit: int) -> Iterator[Tensor]:
    """Adjacent windows [1, length + 1] of the text, each with BOS in front; the rest is left."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    bos = tokenizer.token_to_id("<|begin|>")
    for start in list(range(0, len(ids) - length + 1, length))[:limit]:
        yield torch.tensor([[bos, *ids[start : start + length]]])


@torch.inference_mode()
def evaluate_text(
    model: Llama, tokenizer: Tokenizer, name: str, text: str, length: int, limit: int
) -> TextResult:
    """Perplexities of `text` in windows of `length` tokens, at most `limit` of them."""
    mask = streaming_mask(length, model.embed_tokens.weight.device)
    rows = []
    for tokens in windows(tokenizer, text, length, limit):
        tokens = tokens.to(mask.device)
        losses = (token_losses(model, tokens, m)[0].double() for m in (None, mask))
        rows.append(torch.stack(list(losses)))
    both = torch.stack(rows, dim=1)  # [2, windows, length] nats
    whole = both.mean(dim=(1, 2)).exp().tolist()
    beyond = both[..., SINK + WINDOW :].mean(dim=(1, 2)).exp().tolist()
    return TextResult(name, length, both[0].numel(), *whole, *beyond)


@torch.inference_mode()
def evaluate_passkey(
    model: Llama, tokenizer: Tokenizer, text: str, length: int, documents: int
) -> PasskeyResult:
    """Hide five digits at evenly spread depths of `documents` windows of `text`, then ask."""
    device = model.embed_tokens.weight.device
    mask = streaming_mask(length, device)
    rng = np.random.default_rng(7)
    bos = tokenizer.token_to_id("<|begin|>")
    filler = tokenizer.encode(text, add_special_tokens=False).ids
    right = [0, 0]
    for i in range(documents):
        key = str(int(rng.integers(10_000, 100_000)))
        needle, question = (
            tokenizer.encode(part, add_special_tokens=False).ids
            for part in (
                f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
                f"\nWhat is the pass key? The pass key is {key}",
            )
        )
        room = length - len(needle) - len(question)  # BOS takes the place of the last target
        start = int(rng.integers(0, len(filler) - room))
        page = filler[start : start + room]
        depth = room * i // documents
        ids = torch.tensor([[bos, *page[:depth], *needle, *page[depth:], *question]]).to(device)
        for kind, chosen_mask in enumerate((None, mask)):
            guess = model(ids[:, :-1], chosen_mask)[0, -len(key) :].argmax(-1)
            right[kind] += int(torch.equal(guess, ids[0, -len(key) :]))
    return PasskeyResult(length, documents, right[0] / documents, right[1] / documents)


def main() -> None:
    """Command line of the evaluation; prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="held-out text files")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048])
    parser.add_argument("--windows", type=int, default=1_000_000, help="at most so many per text")
    parser.add_argument("--documents", type=int, default=100, help="pass-key documents")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model).eval()
    tokenizer = load_tokenizer(arguments.model)
    results: dict[str, list[dict[str, object]]] = {"texts": [], "passkey": []}
    for length in arguments.contexts:
        for path in arguments.texts:
            text = path.read_text(encoding="utf-8")
            result = evaluate_text(model, tokenizer, path.name, text, length, arguments.windows)
            results["texts"].append(asdict(result))
            loss = math.log(result.full_perplexity)
            print(f"{result} loss={loss:.4f} gain={result.gain:.2f}%", flush=True)
        filler = arguments.texts[0].read_text(encoding="utf-8")
        recall = evaluate_passkey(model, tokenizer, filler, length, arguments.documents)
        results["passkey"].append(asdict(recall))
        print(recall, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
