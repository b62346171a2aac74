"""Captured CUDA graphs: the same blocks go and the same tokens come as without them."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from ..engines import engine, worker_of
from ..models import random_prompts

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
PROMPTS = random_prompts([600, 60, 900, 300])
PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)
# Of 16 bits: FLASH_ATTN, which captures whole steps, takes nothing else.
KWARGS: dict[str, Any] = {"dtype": "bfloat16", "kv_policy_config": OPTIONS, "block_size": 16}


def run(llm: Any) -> list[Any]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
    return list(zip(tokens, llm.trace.by_index(), strict=True))


def test_a_replayed_step_evicts_as_an_eager_one(llama: str) -> None:
    with engine(llama, policy="semantic", **KWARGS) as llm:
        expected = run(llm)
        assert not any(builder.captured for builder in worker_of(llm)._builders)
    with engine(llama, policy="semantic", enforce_eager=False, **KWARGS) as llm:
        builders = worker_of(llm)._builders
        assert all(builder.captured for builder in builders)
        addresses = [builder.buffers.query_places.data_ptr() for builder in builders]
        found = run(llm)
        assert [builder.buffers.query_places.data_ptr() for builder in builders] == addresses
    assert sum(bool(evictions) for _, evictions in found) == 3, "the shortest never evicts"
    assert found == expected


def test_queries_are_kept_by_a_replayed_kernel(llama: str) -> None:
    """What a graph leaves in the rings is what an eager step leaves there."""
    rings = []
    for eager in (True, False):
        with engine(llama, policy="semantic", enforce_eager=eager, **KWARGS) as llm:
            run(llm)
            groups = worker_of(llm)._block_scorer.groups.values()
            rings.append([layers.queries.clone().cpu() for group in groups for layers in group])
            assert all(ring.any() for ring in rings[-1])
    for eager_ring, replayed in zip(*rings, strict=True):
        assert (eager_ring == replayed).all()
