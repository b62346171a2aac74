"""A long prompt offline: python examples/offline.py [MODEL]."""

import os
import sys
from pathlib import Path

# The engine in this process, so that the block manager's counters can be read at the end.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import SamplingParams

from vllm_semantic import LLM

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "models" / "lookback-5m")
    llm = LLM(
        model,
        kv_policy="semantic",
        kv_policy_config={"semantic_tokens": 128},
        max_model_len=2048,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
    )
    book = ROOT / "benchmarks" / "texts" / "pg19" / "10321.txt"
    prompt = book.read_text(encoding="utf-8")[:5000]
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=64, temperature=0))
    print(output.outputs[0].text)

    (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_policy_managers.values()
    num_tokens = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
    num_blocks = -(-num_tokens // manager.block_size)
    evicted = manager.stats.evicted_blocks
    print(
        f"{num_tokens} tokens filled {num_blocks} blocks of {manager.block_size}: "
        f"{evicted} were evicted, {num_blocks - evicted} kept"
    )


if __name__ == "__main__":
    main()
