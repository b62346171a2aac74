"""Grammars: a mask over the logits, which the cache knows nothing of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.sampling_params import StructuredOutputsParams

from ..engines import engine, reset_trace

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}


@pytest.mark.parametrize("backend", ["xgrammar", "guidance", "outlines"])
def test_a_grammar_masks_and_changes_nothing_else(backend: Any, repo: Path) -> None:
    """Digits by a grammar are those by vLLM's list of allowed tokens, draw for draw."""
    text = sorted((repo / "benchmarks" / "texts" / "pg19").glob("*.txt"))[0].read_text()[:3000]
    with engine(
        str(repo / "models" / "lookback-5m"),
        policy="semantic",
        kv_policy_config=OPTIONS,
        skip_tokenizer_init=False,
        max_num_batched_tokens=1024,  # on CPUs vLLM takes no seed for a prompt in chunks
        structured_outputs_config=StructuredOutputsConfig(backend=backend),
    ) as llm:
        tokenizer = llm.get_tokenizer()
        digits = [i for i in range(len(tokenizer)) if re.fullmatch("[0-9]+", tokenizer.decode([i]))]
        results = []
        for how in (
            {"structured_outputs": StructuredOutputsParams(regex="[0-9]{1000}")},
            {"allowed_token_ids": digits},
        ):
            reset_trace(llm)
            params = SamplingParams(max_tokens=150, seed=3, ignore_eos=True, **how)
            (output,) = llm.generate([text], params, use_tqdm=False)
            results.append((output.outputs[0].text, llm.trace.by_index()))
    (answer, (evictions,)), by_list = results
    assert (answer, [evictions]) == by_list
    assert re.fullmatch("[0-9]{150,}", answer)
    assert len(set(answer)) > 5, "a constant shows little"
    assert len(evictions) > 4
