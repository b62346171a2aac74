"""The instrument itself: what it measures is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.engines import engine

from ..models import random_prompts
from ..oracle import Case, judge
from .test_oracle import TOLERANCE


def test_forced_text_and_memory(llama: str) -> None:
    """Teacher-forced likelihoods are the oracle's; weights weigh what the file weighs."""
    lengths = [400, 150]
    documents = [prompt["prompt_token_ids"] for prompt in random_prompts(lengths)]
    num_prompt = 100
    with engine(
        llama,
        "streaming",
        {"recent_tokens": 64},
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=32 << 20,
        enforce_eager=True,
        skip_tokenizer_init=True,
    ) as side:
        measured = side.nll(documents, num_prompt)["nll"]
        stats = side.stats()
    verdicts = judge(
        [
            Case(llama, tokens, num_prompt, 32, 512, sink_tokens=4, recent_tokens=64)
            for tokens in documents
        ]
    )
    for losses, verdict in zip(measured, verdicts, strict=True):
        assert [-loss for loss in losses] == pytest.approx(verdict.logprobs, abs=TOLERANCE)
    evicted = [block for v in verdicts for blocks in v.evictions.values() for block in blocks]
    assert stats["evicted_blocks"] == len(evicted) > 0
    on_disk = load_file(Path(llama) / "model.safetensors")
    assert stats["weight_bytes"] == sum(tensor.nbytes for tensor in on_disk.values())
