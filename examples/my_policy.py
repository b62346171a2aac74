"""A policy of one's own in one file: keep the blocks whose values are largest.

Any process that can import the class can name it, so from the root of the repository:

    python -m examples.my_policy
    PYTHONPATH=. vllm serve MODEL --kv-policy examples.my_policy.ValueNormPolicy
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from vllm_semantic.policies import BlockView, SelectivePolicy

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class ValueNormPolicy(SelectivePolicy):
    """Sink, recent, and the blocks with large values: they say most when they are attended to."""

    name: ClassVar[str] = "value_norm"

    def score(self, view: BlockView) -> torch.Tensor:
        # [num_layers, num_blocks, num_kv_heads, block_size, head_size] -> [num_layers, num_blocks]
        return view.full.values.norm(dim=-1).mean(dim=(2, 3))  # higher = keep


def main() -> None:
    from vllm import SamplingParams

    from vllm_semantic import LLM

    llm = LLM(
        str(ROOT / "models" / "lookback-5m"),
        kv_policy="examples.my_policy.ValueNormPolicy",
        kv_policy_config={"selected_tokens": 128},
        max_model_len=2048,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
    )
    book = ROOT / "benchmarks" / "texts" / "pg19" / "10321.txt"
    prompt = book.read_text(encoding="utf-8")[:5000]
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=64, temperature=0))
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
