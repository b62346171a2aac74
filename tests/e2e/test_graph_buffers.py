"""What a full CUDA graph would read: always the same memory, with the right contents.

No graph can be captured on a CPU. But once its builders believe that one was, every step goes
through the buffers a graph reads, whether blocks were lost or not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from vllm import SamplingParams

from ..engines import engine, worker_of
from ..models import random_prompts

pytestmark = pytest.mark.cpu_build("on a GPU graphs are captured: tests/gpu/test_graphs.py")

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 128}
PROMPTS = random_prompts([600, 60, 900, 300])
PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)


def run(llm: Any) -> list[Any]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
    return list(zip(tokens, llm.trace.by_index(), strict=True))


def builders_of(llm: Any) -> list[Any]:
    worker = worker_of(llm)
    return list(worker._builders)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_every_step_goes_through_the_same_memory(num_groups: int, llama: str) -> None:
    """Each group of layers has its own."""
    options = OPTIONS | {"layer_groups": num_groups}
    with engine(llama, policy="semantic", kv_policy_config=options) as llm:
        expected = run(llm)
    seen: list[list[Any]] = []
    with engine(llama, policy="semantic", kv_policy_config=options) as llm:
        for builder in builders_of(llm):
            seen.append([])
            builder.captured = True
            builder.build = partial(following, builder.build, seen[-1])
        assert run(llm) == expected
    assert len(seen) == num_groups
    for steps in seen:
        assert len(steps) > PARAMS.max_tokens
        assert len({tuple(t.data_ptr() for t in tensors) for tensors in steps}) == 1
        widths = {block_table.shape[1] for block_table, *_ in steps}
        # Budget, the tokens of a step in flight and the block being filled: never the whole length.
        assert widths == {7 + 512 // 32 + 1}
    assert len({steps[0][0].data_ptr() for steps in seen}) == num_groups


def following(build: Any, seen: list[Any], *args: Any, **kwargs: Any) -> Any:
    metadata = build(*args, **kwargs)
    seen.append((metadata.block_table, metadata.seq_lens, metadata.query_places))
    return metadata


def test_capturing_marks_the_builder(llama: str) -> None:
    """vLLM announces a capture; from then on the buffers are kept up to date."""
    with engine(llama, policy="semantic", kv_policy_config=OPTIONS) as llm:
        (builder,) = builders_of(llm)
        assert not builder.captured
        common: list[Any] = []
        build = builder.build

        def catching(
            common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            common.append(common_attn_metadata)
            return build(common_prefix_len, common_attn_metadata, fast_build)

        builder.build = catching
        llm.generate(PROMPTS[1:2], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
        metadata = builder.build_for_cudagraph_capture(common[-1])
        assert builder.captured
        assert metadata.block_table.data_ptr() == builder.buffers.block_table.data_ptr()
        assert metadata.seq_lens.data_ptr() == builder.buffers.seq_lens.data_ptr()
        assert metadata.query_places.data_ptr() == builder.buffers.query_places.data_ptr()
        # No request is running: the graph's kernels find that there is nothing to keep.
        assert metadata.query_places[0].tolist() == [0, 0]
