"""The correctness oracle: transformers in float32 with evicted positions masked.

An implementation of its own, from the policy's definition: it shares no code with the
plugin. It runs in a process of its own (``python -m tests.oracle``), because vLLM's Transformers
backend patches the model classes of the process it runs in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, field
from functools import cache
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
    selected_tokens: int = 0
    rule: str = "age"
    """Which of :data:`RULES` the selected tokens are kept by."""
    bounded: bool = True
    nf4: bool = False
    """Round the linear weights to NF4 and back, as the engine's were."""
    dtype: str = "float32"
    forced: dict[int, list[Any]] | None = None
    """Apply these evictions and only say how far each is from the best choice."""
    eviction_delay: int = 0
    """Tokens after each eviction that still see the blocks: 1 under asynchronous scheduling."""
    layer_groups: int = 1
    """Equal shares of the layers, the first, the next and so on; each evicts for itself."""
    layer_skew_tokens: int = 0
    """How much more than the rest of the budget the last group keeps, and the first less."""
    recall: bool = False
    """Whether evicted blocks may come back: at the end of the prompt, whose last 256 tokens see
    all that there was, and at eviction points."""
    recall_blocks: int = 0
    """The most that come back at an eviction point, each where it is worth a tenth more than what
    it replaces."""


@dataclass
class Verdict:
    """What should have happened."""

    evictions: dict[int, list[Any]] = field(default_factory=dict)
    """Computed tokens at the eviction -> logical blocks evicted there; with several groups of
    layers a list of them for each."""
    recalls: dict[int, list[Any]] = field(default_factory=dict)
    """The same of the blocks that came back."""
    margins: dict[int, float] = field(default_factory=dict)
    """Computed tokens at the eviction -> least score kept minus greatest score evicted, in the
    group where that is least."""
    greedy: list[int] = field(default_factory=list)
    """argmax after each generated position's predecessor."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each generated token."""
    gaps: list[float] = field(default_factory=list)
    """Log-probability of the best token minus the second best's."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token of the prompt but the first."""


def judge(cases: list[Case]) -> list[Verdict]:
    """Run the oracle over some cases, in a process of its own that lives as long as this one."""
    process = _process()
    process.stdin.write(json.dumps([asdict(case) for case in cases]) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, f"the oracle ended, exit status {process.wait()}"
    answer = json.loads(line)
    assert "error" not in answer, answer["error"]
    verdicts = [Verdict(**verdict) for verdict in answer["verdicts"]]
    for verdict in verdicts:
        verdict.evictions = {int(k): v for k, v in verdict.evictions.items()}
        verdict.recalls = {int(k): v for k, v in verdict.recalls.items()}
        verdict.margins = {int(k): v for k, v in verdict.margins.items()}
    return verdicts


@cache
def _process() -> Any:
    """Ends with its standard input, so with this process."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.oracle"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )


def eviction_points(case: Case) -> list[int]:
    """Where blocks may be evicted: in the prompt, at its end, then at every full block."""
    num_prompt, total = case.num_prompt_tokens, len(case.token_ids)
    points = list(range(case.prefill_interval, num_prompt, case.prefill_interval))
    points.append(num_prompt)
    points += [n for n in range(num_prompt + 1, total) if n % case.block_size == 0]
    return points


@dataclass
class Layer:
    """What one attention layer computes with, after RoPE."""

    query: Any  # [num_heads, length, head_size]
    key: Any  # [num_kv_heads, length, head_size]
    value: Any
    scale: float


@dataclass
class Group:
    """Layers that evict for themselves."""

    mask: Any
    """``[total, total]``, what each token sees."""
    alive: set[int] = field(default_factory=set)
    """Full blocks that were not evicted."""
    away: set[int] = field(default_factory=set)
    """Those that were, and did not come back."""
    scores: dict[int, float] = field(default_factory=dict)
    """Of the last eviction point."""
    worth: dict[int, float] = field(default_factory=dict)
    """By which blocks went, or came back, there."""
    scored_at: int = 0
    """That point."""


@dataclass
class Held:
    """A request at an eviction point: what its layers, of one group, hold, block by block."""

    oracle: Any
    layers: list[Layer]
    blocks: list[int]
    """Full blocks that were not evicted, and those that may come back."""
    point: int
    size: int
    before: dict[int, float]
    """Scores at the last eviction point."""
    asks: bool = False
    """Whether the point ends a question: the highest layer decides, and the sink is out of it."""

    def tokens(self, block: int) -> slice:
        return slice(block * self.size, (block + 1) * self.size)

    def average(self, of_layer: Any) -> dict[int, float]:
        """What a layer says about each block: the mean over layers, or the highest."""
        of_layers = [of_layer(layer) for layer in self.layers]
        of_blocks = {b: [float(of[b]) for of in of_layers] for b in self.blocks}
        return {b: max(of) if self.asks else sum(of) / len(of) for b, of in of_blocks.items()}

    def attention(self, layer: Layer, num_queries: int) -> Any:
        """Of the last queries over what is held now, ``[num_heads, num_queries, point]``."""
        torch = self.oracle.torch
        held = torch.zeros(self.point, dtype=torch.bool)
        for block in self.blocks:
            held[self.tokens(block)] = True
        held[self.point // self.size * self.size :] = True
        rows = []
        for head, queries in enumerate(layer.query):
            key = layer.key[head * len(layer.key) // len(layer.query)]
            for i in range(self.point - num_queries, self.point):
                logits = key @ queries[i] * layer.scale
                logits[~held] = float("-inf")
                logits[i + 1 :] = float("-inf")
                rows.append(logits.softmax(0))
        return torch.stack(rows).view(len(layer.query), num_queries, self.point)

    def attended(self, num_queries: int) -> dict[int, float]:
        """Attention of the last queries to each block: summed over both, mean over heads."""

        def of_layer(layer: Layer) -> dict[int, Any]:
            weights = self.attention(layer, num_queries).sum(1).mean(0)
            return {b: weights[self.tokens(b)].sum() for b in self.blocks}

        return self.average(of_layer)

    def contributed(self, num_queries: int, of_heads: Any) -> dict[int, float]:
        """Attention to each token of a block times the norm of its value, of the last queries."""

        def of_layer(layer: Layer) -> dict[int, Any]:
            weights = self.attention(layer, num_queries)
            sums = {}
            for b in self.blocks:
                by_head = []
                for head, of_queries in enumerate(weights):
                    values = layer.value[head * len(layer.value) // len(weights), self.tokens(b)]
                    norms = (values * values).sum(1) ** 0.5
                    by_head.append(float((of_queries[:, self.tokens(b)] @ norms).mean()))
                sums[b] = of_heads(by_head)
            return sums

        return self.average(of_layer)

    def by_head(self, of_head: Any) -> dict[int, float]:
        """Mean over KV heads and layers of ``of_head(group's queries, key, value)``.

        Newest queries of the group ``[group, head_size]``, a block's keys and values.
        """

        def of_layer(layer: Layer) -> dict[int, Any]:
            newest = layer.query[:, -1].unflatten(0, (len(layer.key), -1))
            heads = list(zip(newest, layer.key, layer.value, strict=True))
            return {
                b: sum(of_head(q, k[self.tokens(b)], v[self.tokens(b)]) for q, k, v in heads)
                / len(heads)
                for b in self.blocks
            }

        return self.average(of_layer)


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def study(held: Held) -> dict[int, float]:
    return held.by_head(lambda q, k, v: cosine(q.mean(0), k.mean(0)))


def attention(held: Held) -> dict[int, float]:
    return decayed(held, held.attended(8), 0.8)


def contribution(held: Held) -> dict[int, float]:
    return decayed(held, held.contributed(8, lambda of: sum(of) / len(of)), 0.9)


def contribution_to_one_head(held: Held) -> dict[int, float]:
    return decayed(held, held.contributed(8, max), 0.9)


def decayed(held: Held, now: dict[int, float], decay: float) -> dict[int, float]:
    return {b: score + decay * held.before.get(b, 0.0) for b, score in now.items()}


def h2o(held: Held) -> dict[int, float]:
    now = held.attended(min(32, held.size))
    return {b: score + held.before.get(b, 0.0) for b, score in now.items()}


def tova(held: Held) -> dict[int, float]:
    return held.attended(1)


def snapkv(held: Held) -> dict[int, float]:
    def of_layer(layer: Layer) -> dict[int, Any]:
        votes = held.attention(layer, 32).mean((0, 1))
        of_held = [b for b in held.blocks for _ in range(held.size)]
        kept = [i for b in held.blocks for i in range(held.tokens(b).start, held.tokens(b).stop)]
        kept += range(held.point // held.size * held.size, held.point)
        pooled = []
        for i in range(len(of_held)):
            near = kept[max(0, i - 3) : i + 4]
            # A block being filled is as long as a full one; nobody attends to its rest.
            rest = held.size - held.point % held.size if held.point % held.size else 0
            count = min(i + 4, len(kept) + rest) - max(0, i - 3)
            pooled.append(float(votes[near].sum()) / count)
        sums = dict.fromkeys(held.blocks, 0.0)
        for block, value in zip(of_held, pooled, strict=True):
            sums[block] += value / held.size
        return sums

    return held.average(of_layer)


def keydiff(held: Held) -> dict[int, float]:
    def of_layer(layer: Layer) -> dict[int, Any]:
        sums = dict.fromkeys(held.blocks, 0.0)
        for key in layer.key:
            unit = [
                key[held.tokens(b)] / key[held.tokens(b)].norm(dim=-1, keepdim=True)
                for b in held.blocks
            ]
            anchor = sum(u.sum(0) for u in unit) / (len(unit) * held.size)
            for block, u in zip(held.blocks, unit, strict=True):
                sums[block] -= float(cosine(u, anchor).mean()) / len(layer.key)
        return sums

    return held.average(of_layer)


RULES: dict[str, Any] = {
    "attention": attention,
    "contribution": contribution,
    "contribution, max": contribution_to_one_head,
    "study": study,
    "h2o": h2o,
    "tova": tova,
    "snapkv": snapkv,
    "paged_eviction": lambda held: held.by_head(
        lambda q, k, v: (v.norm(dim=-1) / k.norm(dim=-1)).mean()
    ),
    "knorm": lambda held: held.by_head(lambda q, k, v: -k.norm(dim=-1).mean()),
    "keydiff": keydiff,
    "quest": lambda held: held.by_head(
        lambda q, k, v: (
            sum(
                float((one * k).amax(0).sum())
                for one in q  # the products' extremes are at the keys'
            )
            / len(q)
        )
    ),
    "ucm": lambda held: held.by_head(lambda q, k, v: q.mean(0) @ k.mean(0)),
}
"""Higher = keep; each from its paper's definition, reduced to blocks by the mean."""


def shifts(case: Case, num_selected: int) -> list[int]:
    """Blocks that each group keeps beyond the budget, on a line from the first to the last."""
    if case.layer_groups == 1:
        return [0]
    steep = 2 * case.layer_skew_tokens / (case.layer_groups - 1)
    return [
        max(
            -num_selected,
            min(num_selected, round((steep * i - case.layer_skew_tokens) / case.block_size)),
        )
        for i in range(case.layer_groups)
    ]


class Oracle:
    """One model, evaluated with an explicit mask."""

    def __init__(self, path: str, nf4: bool, dtype: str) -> None:
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.torch = torch
        self.calls: list[Layer] = []
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
        torch = self.torch
        if self.masks and not kwargs.get("sliding_window"):
            visible = self.masks[len(self.calls)][: self.length, : self.length]
        else:
            visible = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if window := kwargs.get("sliding_window"):  # forgets by itself, under no policy
            visible = visible.triu(1 - window)
        else:
            self.calls.append(Layer(query[0].float(), key[0].float(), value[0].float(), scale))
        if (sinks := kwargs.get("s_aux")) is not None:
            key, value, visible = self._with_sink(key, value, visible, sinks)
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            scale=scale,
            enable_gqa=True,
        )
        return output.transpose(1, 2).contiguous(), None

    def _with_sink(self, key: Any, value: Any, visible: Any, sinks: Any) -> tuple[Any, Any, Any]:
        """One more key of nothing, which each head gives a learned logit and no value."""
        pad, bias = self.torch.nn.functional.pad, self.torch.zeros(visible.shape)
        bias = bias.masked_fill(~visible, float("-inf")).expand(len(sinks), -1, -1)
        column = sinks.view(-1, 1, 1).expand(-1, len(visible), 1).to(bias.dtype)
        bias = self.torch.cat([bias, column], dim=2)
        return pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1)), bias

    def run(self, case: Case) -> Verdict:
        torch = self.torch
        verdict = Verdict()
        self.ids = ids = torch.tensor([case.token_ids])
        total, size = len(case.token_ids), case.block_size
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        groups = [Group(causal.clone()) for _ in range(case.layer_groups)]
        with torch.no_grad():
            self.masks = []
            self._forward(ids, 1)
            share = len(self.calls) // len(groups)
            self.masks = [group.mask for group in groups for _ in range(share)]
            assert len(self.masks) == len(self.calls)
            seen, first = 0, None
            question = slice(max(0, case.num_prompt_tokens - 256), case.num_prompt_tokens)
            for point in eviction_points(case):
                asks = case.recall and point == case.num_prompt_tokens
                asks = asks and first is not None and first + case.eviction_delay < point
                for group in groups:
                    group.alive |= set(range(seen, point // size))
                seen = point // size
                evicted, margin = self._choose(case, groups, point, asks)
                pairs = zip(groups, evicted, strict=True)
                recalled = [self._recall(case, group, gone, point, asks) for group, gone in pairs]
                if any(evicted) or any(recalled):
                    one = len(groups) == 1
                    verdict.evictions[point] = evicted[0] if one else evicted
                    verdict.margins[point] = margin
                    if any(recalled):
                        verdict.recalls[point] = recalled[0] if one else recalled
                    first = point if first is None else first
                    sees_from = point + case.eviction_delay
                    for group, back in zip(groups, recalled, strict=True):
                        for blocks, visible in ((group.away, False), (back, True)):
                            for block in blocks:
                                hidden = slice(block * size, (block + 1) * size)
                                group.mask[sees_from:, hidden] = visible
                                if case.recall:
                                    group.mask[question, hidden] = causal[question, hidden]
            logprobs = torch.log_softmax(self._forward(ids, total).double(), -1)
        for position in range(1, total):
            row = logprobs[position - 1]
            if position < case.num_prompt_tokens:
                verdict.prompt_logprobs.append(float(row[case.token_ids[position]]))
                continue
            best = row.topk(2)
            verdict.greedy.append(int(best.indices[0]))
            verdict.gaps.append(float(best.values[0] - best.values[1]))
            verdict.logprobs.append(float(row[case.token_ids[position]]))
        return verdict

    def _forward(self, ids: Any, length: int) -> Any:
        self.calls.clear()
        self.length = length
        return self.model(ids[:, :length], use_cache=False).logits[0]

    def _recall(
        self, case: Case, group: Group, evicted: list[int], point: int, asks: bool
    ) -> list[int]:
        """What comes back into a group, after what goes for the budget; ``evicted`` gets more."""
        size = case.block_size
        recalled: list[int] = []
        most, margin = (len(group.away), 0.0) if asks else (case.recall_blocks, 0.1)
        group.alive -= set(evicted)
        if case.recall and group.scored_at == point:
            held = sorted(group.alive)
            num_recent = -(-case.recent_tokens // size)
            middle = held[-(-case.sink_tokens // size) : len(held) - num_recent]
            worst = sorted(middle, key=lambda b: (group.worth[b], b))
            scored = [b for b in group.away if b in group.worth]
            best = sorted(scored, key=lambda b: (-group.worth[b], -b))
            for goes, comes in list(zip(worst, best, strict=False))[:most]:
                if group.worth[comes] <= group.worth[goes] * (1 + margin):
                    break
                evicted.append(goes)
                recalled.append(comes)
        group.alive = (group.alive - set(evicted)) | set(recalled)
        group.away = (group.away | set(evicted)) - set(recalled)
        evicted.sort()
        return sorted(recalled)

    def _choose(
        self, case: Case, groups: list[Group], point: int, asks: bool
    ) -> tuple[list[list[int]], float]:
        """What each group evicts to be within its budget, and the least margin."""
        size = case.block_size
        num_sink = -(-case.sink_tokens // size)
        num_recent = -(-case.recent_tokens // size)
        num_selected = -(-case.selected_tokens // size)
        held = [sorted(group.alive) for group in groups]
        budgets = [
            num_sink + num_recent + num_selected + shift for shift in shifts(case, num_selected)
        ]
        excesses = [
            max(0, len(alive) - budget) for alive, budget in zip(held, budgets, strict=True)
        ]
        # As soon as one group has too much, all of them score.
        if not case.bounded or not (asks or any(excesses)):
            return [[] for _ in groups], float("inf")
        if case.rule == "age":
            gone = [
                alive[num_sink : num_sink + excess]
                for alive, excess in zip(held, excesses, strict=True)
            ]
            return gone, float("inf")
        self._forward(self.ids, point)  # what was evicted before is masked by now
        layers, share = list(self.calls), len(self.calls) // len(groups)
        forced: list[Any] = [None] * len(groups)
        if case.forced is not None:
            of_point = case.forced.get(point, [])
            forced = of_point if len(groups) > 1 else [of_point]
        evicted, margin = [], float("inf")
        for i, (group, alive, excess) in enumerate(zip(groups, held, excesses, strict=True)):
            of_group = layers[i * share : (i + 1) * share]
            scored = alive
            if case.recall and (asks or case.recall_blocks):
                scored = sorted([*(alive[num_sink:] if asks else alive), *group.away])
            before = {} if asks or (case.recall and case.recall_blocks) else group.scores
            worth = RULES[case.rule](Held(self, of_group, scored, point, size, before, asks))
            group.scores, group.scored_at = worth, point
            if asks:  # what one block begins to say, the next may end; nobody remembers that
                said = {b + 1: score - 0.1 * abs(score) for b, score in worth.items()}
                worth = {b: max(score, said.get(b, score)) for b, score in worth.items()}
            group.worth = worth
            middle = alive[num_sink : len(alive) - num_recent]
            ranked = sorted((worth[block], block) for block in middle)
            gone = forced[i]
            if gone is None:
                gone = sorted(block for _, block in ranked[:excess])
            kept_worth = [score for score, block in ranked if block not in gone]
            gone_worth = [score for score, block in ranked if block in gone]
            if gone_worth:
                margin = min(margin, min(kept_worth, default=float("inf")) - max(gone_worth))
            evicted.append(gone)
        return evicted, margin


def main() -> None:
    """Answer each line of standard input, a list of cases, with a line of verdicts."""
    oracles: dict[tuple[str, bool, str], Oracle] = {}
    for line in sys.stdin:
        try:
            verdicts = [asdict(_verdict(Case(**case), oracles)) for case in json.loads(line)]
            answer: dict[str, Any] = {"verdicts": verdicts}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


def _verdict(case: Case, oracles: dict[tuple[str, bool, str], Oracle]) -> Verdict:
    if case.forced is not None:
        case.forced = {int(point): blocks for point, blocks in case.forced.items()}
    key = (case.model, case.nf4, case.dtype)
    if key not in oracles:
        oracles[key] = Oracle(*key)
    return oracles[key].run(case)


if __name__ == "__main__":
    main()
