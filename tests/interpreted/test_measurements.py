"""What a benchmark times where steps are scheduled ahead: decode steps, and nothing in flight."""

from __future__ import annotations

from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks.engines import EngineSide

from .. import interpreter
from ..models import random_prompts

OPTIONS = {"sink_tokens": 8, "recent_tokens": 64, "semantic_tokens": 64}


def test_prompts_are_read_before_the_clock_starts(llama: str) -> None:
    interpreter.allow_async_scheduling()
    side = EngineSide(
        llama,
        "semantic",
        OPTIONS,
        {
            "dtype": "float32",
            "block_size": 32,
            "max_model_len": 1024,
            "max_num_batched_tokens": 256,
            "kv_cache_memory_bytes": 32 << 20,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "uni",
            "async_scheduling": True,
        },
        forcing=False,
    )
    core = side.llm.llm_engine.engine_core.engine_core
    prompts = [prompt["prompt_token_ids"] for prompt in random_prompts([300, 420])]
    assert side.start_decoding(prompts, 8) > 0
    assert side.settings()["async_scheduling"]
    in_flight = [output for _, output, _ in core.batch_queue]
    assert in_flight, "nothing is in flight: this shows nothing"
    for output in in_flight:
        assert set(output.num_scheduled_tokens.values()) == {1}
    assert side.decode(3) > 0
    kept = side.kept_kv()
    per_token = 2 * 2 * 2 * 64 * 4  # layers, keys and values, heads, channels, bytes
    read = side.read_kv_bytes() / per_token
    # The kernels read what is kept; the scheduler is up to four steps and one ahead behind.
    assert 0 <= read - kept["tokens"] * 2 <= 2 * 5
    assert kept["kv_bytes"] == kept["tokens"] * 2 * per_token
    assert 160 <= kept["tokens"] <= 160 + 2 * 32 < min(map(len, prompts))
    side.stop_decoding()
    assert not core.scheduler.requests
    side.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
