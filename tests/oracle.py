"""The correctness oracle: transformers in float32 with evicted positions masked.

An implementation of its own, from the policy's definition: it shares no code with the
plugin. It runs in a process of its own (``python -m tests.oracle < cases.json``), because
vLLM's Transformers backend patches the model classes of the process it runs in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Case:
    """A sequence and the policy it ran under; tokens are prompt + generated."""

    model: str
    token_ids: list[int]
    num_prompt_tokens: int
    block_size: int
    prefill_interval: int
    sink_tokens: int = 0
    recent_tokens: int = 0
    semantic_tokens: int | None = None
    """``None``: StreamingLLM, by age."""
    bounded: bool = True
    nf4: bool = False
    """Round the linear weights to NF4 and back, as the engine's were."""
    dtype: str = "float32"
    forced: dict[int, list[int]] | None = None
    """Apply these evictions and only say how far each is from the best choice."""
    eviction_delay: int = 0
    """Tokens after each eviction that still see the blocks: 1 under asynchronous scheduling."""


@dataclass
class Verdict:
    """What should have happened."""

    evictions: dict[int, list[int]] = field(default_factory=dict)
    """Computed tokens at the eviction -> logical blocks evicted there."""
    margins: dict[int, float] = field(default_factory=dict)
    """Computed tokens at the eviction -> least score kept minus greatest score evicted."""
    greedy: list[int] = field(default_factory=list)
    """argmax after each generated position's predecessor."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each generated token."""
    gaps: list[float] = field(default_factory=list)
    """Log-probability of the best token minus the second best's."""


def judge(cases: list[Case]) -> list[Verdict]:
    """Run the oracle over some cases in a process of its own."""
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, "-m", "tests.oracle"],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [
        Verdict(
            evictions={int(k): v for k, v in verdict["evictions"].items()},
            margins={int(k): v for k, v in verdict["margins"].items()},
            greedy=verdict["greedy"],
            logprobs=verdict["logprobs"],
            gaps=verdict["gaps"],
        )
        for verdict in json.loads(run.stdout)
    ]


def eviction_points(case: Case) -> list[int]:
    """Where blocks may be evicted: in the prompt, at its end, then at every full block."""
    num_prompt, total = case.num_prompt_tokens, len(case.token_ids)
    points = list(range(case.prefill_interval, num_prompt, case.prefill_interval))
    points.append(num_prompt)
    points += [n for n in range(num_prompt + 1, total) if n % case.block_size == 0]
    return points


class Oracle:
    """One model, evaluated with an explicit mask."""

    def __init__(self, path: str, nf4: bool, dtype: str) -> None:
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.torch = torch
        self.calls: list[tuple[Any, Any]] = []  # per layer: query, key after RoPE
        attention = f"oracle-{id(self)}"
        AttentionInterface.register(attention, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()
        if nf4:
            self._round_to_nf4()

    def _round_to_nf4(self) -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        for name, module in self.model.named_modules():
            if isinstance(module, self.torch.nn.Linear) and "lm_head" not in name:
                packed, state = quantize_4bit(
                    module.weight.data, compress_statistics=True, quant_type="nf4"
                )
                module.weight.data = dequantize_4bit(packed, state).to(module.weight.dtype)

    def _attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> tuple[Any, None]:
        visible = self.mask[: self.length, : self.length]
        if window := kwargs.get("sliding_window"):  # forgets by itself, under no policy
            visible = self.torch.ones_like(visible).tril().triu(1 - window)
        else:
            self.calls.append((query, key))
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        output = self.torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            scale=scale,
            enable_gqa=True,
        )
        return output.transpose(1, 2).contiguous(), None

    def run(self, case: Case) -> Verdict:
        torch = self.torch
        verdict = Verdict()
        self.ids = ids = torch.tensor([case.token_ids])
        total, size = len(case.token_ids), case.block_size
        self.mask = torch.ones(total, total, dtype=torch.bool).tril()
        with torch.no_grad():
            alive: set[int] = set()
            seen = 0
            for point in eviction_points(case):
                alive |= set(range(seen, point // size))
                seen = point // size
                evicted, margin = self._choose(case, sorted(alive), point)
                if not evicted:
                    continue
                verdict.evictions[point], verdict.margins[point] = evicted, margin
                alive -= set(evicted)
                for block in evicted:
                    self.mask[point + case.eviction_delay :, block * size : (block + 1) * size] = (
                        False
                    )
            logprobs = torch.log_softmax(self._forward(ids, total).double(), -1)
        for position in range(case.num_prompt_tokens, total):
            row = logprobs[position - 1]
            best = row.topk(2)
            verdict.greedy.append(int(best.indices[0]))
            verdict.gaps.append(float(best.values[0] - best.values[1]))
            verdict.logprobs.append(float(row[case.token_ids[position]]))
        return verdict

    def _forward(self, ids: Any, length: int) -> Any:
        self.calls.clear()
        self.length = length
        return self.model(ids[:, :length], use_cache=False).logits[0]

    def _choose(self, case: Case, alive: list[int], point: int) -> tuple[list[int], float]:
        size = case.block_size
        num_sink = -(-case.sink_tokens // size)
        num_recent = -(-case.recent_tokens // size)
        num_semantic = -(-(case.semantic_tokens or 0) // size)
        forced = None if case.forced is None else case.forced.get(point, [])
        excess = len(alive) - (num_sink + num_recent + num_semantic)
        if not case.bounded or excess <= 0:
            return [], float("inf")
        middle = alive[num_sink : len(alive) - num_recent]
        if case.semantic_tokens is None:
            return middle[:excess], float("inf")
        self._forward(self.ids, point)  # what was evicted before is masked by now
        ranked = sorted((self._similarity(block, size), block) for block in middle)
        if forced is not None:
            kept = [score for score, block in ranked if block not in forced]
            gone = [score for score, block in ranked if block in forced]
            return forced, min(kept) - max(gone)
        margin = ranked[excess][0] - ranked[excess - 1][0] if excess < len(ranked) else float("inf")
        return sorted(block for _, block in ranked[:excess]), margin

    def _similarity(self, block: int, size: int) -> float:
        """Cosine of the newest query and the block's mean key, over layers and KV heads."""
        cosines = []
        for query, key in self.calls:
            kv_heads = key.shape[1]
            newest = query[0, :, -1].float().unflatten(0, (kv_heads, -1)).mean(1)
            mean_key = key[0, :, block * size : (block + 1) * size].float().mean(1)
            norms = newest.norm(dim=1) * mean_key.norm(dim=1)
            cosines.append(((newest * mean_key).sum(1) / norms).mean())
        return float(sum(cosines) / len(cosines))


def main() -> None:
    cases = [Case(**case) for case in json.load(sys.stdin)]
    oracles: dict[tuple[str, bool, str], Oracle] = {}
    verdicts = []
    for case in cases:
        if case.forced is not None:
            case.forced = {int(point): blocks for point, blocks in case.forced.items()}
        key = (case.model, case.nf4, case.dtype)
        if key not in oracles:
            oracles[key] = Oracle(*key)
        verdicts.append(asdict(oracles[key].run(case)))
    json.dump(verdicts, sys.stdout)


if __name__ == "__main__":
    main()
