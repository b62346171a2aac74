"""A prompt that asks for what was evicted while it was read: python examples/recall.py [MODEL]."""

import os
import sys
from pathlib import Path

# The engine in this process, so that the block manager's counters can be read at the end.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import SamplingParams

from vllm_semantic import LLM

ROOT = Path(__file__).resolve().parent.parent
FACT = "\nThe pass key is 67326. Remember it. 67326 is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "models" / "lookback-5m")
    llm = LLM(
        model,
        kv_policy="semantic",
        kv_policy_config={"recall_gib": 0.25},
        max_model_len=2048,
        max_num_batched_tokens=512,  # a prompt is read in chunks, and cut down after each
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
    )
    book = (ROOT / "benchmarks" / "texts" / "pg19" / "10321.txt").read_text(encoding="utf-8")
    prompt = book[:300] + FACT + book[300:5000] + QUESTION
    for recall in (False, True):
        params = SamplingParams(
            max_tokens=6, temperature=0, extra_args={"kv_policy": {"recall": recall}}
        )
        (output,) = llm.generate([prompt], params)
        print(f"{'with' if recall else 'without'} recall: {output.outputs[0].text.strip()}")
    (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_policy_managers.values()
    stats = manager.stats
    print(
        f"{stats.evicted_blocks} blocks were evicted, {stats.copied_blocks} kept in host memory, "
        f"{stats.recalled_blocks} came back"
    )


if __name__ == "__main__":
    main()
