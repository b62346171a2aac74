"""A policy of one's own in one file: keep the blocks with the smallest key norms.

Knorm (Devoto et al., 2024, arXiv:2406.11430) on whole blocks. Any process that can import the
class can name it, so from the root of the repository:

    python -m examples.my_policy
    PYTHONPATH=. vllm serve MODEL --kv-policy examples.my_policy.KnormPolicy
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from vllm_semantic.policies import KVPolicy

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class KnormPolicy(KVPolicy):
    """Sink, recent, and the blocks with small keys: a small key tends to be attended more."""

    name: ClassVar[str] = "knorm"

    sink_tokens: int = 8
    recent_tokens: int = 64
    kept_tokens: int = 192

    @property
    def selected_tokens(self) -> int:
        return self.kept_tokens

    def score(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        # keys: [num_blocks, num_kv_heads, block_size, head_size] -> [num_blocks], higher = keep
        return -keys.float().norm(dim=-1).mean(dim=(1, 2))


def main() -> None:
    from vllm import SamplingParams

    from vllm_semantic import LLM

    llm = LLM(
        str(ROOT / "models" / "lookback-5m"),
        kv_policy="examples.my_policy.KnormPolicy",
        kv_policy_config={"kept_tokens": 128},
        max_model_len=2048,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
    )
    book = ROOT / "benchmarks" / "texts" / "books" / "dragons-blood-1.txt"
    prompt = book.read_text(encoding="utf-8")[:5000]
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=64, temperature=0))
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
