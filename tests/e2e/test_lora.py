"""An adapter beside the weights is the model that it was merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from ..engines import engine, reset_trace
from ..models import make_lora, random_prompts

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
PROMPTS = random_prompts([700, 300])
PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)


def run(llm: Any, prompts: list[Any], adapters: list[LoRARequest] | None = None) -> list[Any]:
    """Tokens and evictions of each prompt."""
    reset_trace(llm)
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False, lora_request=adapters)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return list(zip(tokens, llm.trace.by_index(), strict=True))


def test_adapters_in_one_batch(llama: str, tmp_path: Path) -> None:
    """Each request evicts what its own model would, though prefixes are alike and shared.

    On a CPU vLLM 0.32 gives an adapter to requests that ask for none, so all ask for one.
    """
    expected, adapters = [], []
    for i in (1, 2):
        adapter, merged = tmp_path / f"adapter-{i}", tmp_path / f"merged-{i}"
        make_lora(llama, adapter, merged, seed=i)
        adapters += [LoRARequest(f"adapter-{i}", i, str(adapter))] * len(PROMPTS)
        with engine(str(merged), policy="semantic", kv_policy_config=OPTIONS) as llm:
            expected += run(llm, PROMPTS)
    assert all(evictions for _, evictions in expected)
    assert expected[0][1] != expected[2][1]
    with engine(
        llama,
        policy="semantic",
        kv_policy_config=OPTIONS,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        enable_prefix_caching=True,
    ) as llm:
        for _ in range(2):
            assert run(llm, 2 * PROMPTS, adapters) == expected
