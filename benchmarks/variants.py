"""The search for a better rule: variants of the semantic family on validation texts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vllm_semantic.policies.base import BlockBudget

from . import texts
from .context import RESULTS, context
from .paged_decoder import BLOCK_SIZE, PagedDecoder, Rule, State, tokens_of
from .progress import progress_bar
from .statistics import paired_difference

BUDGET = 264
"""Tokens, held as nine blocks of 32: the splits below."""

TEXTS = ("wikitext-valid", "pg19-valid")

EACH = 0
"""Groups of layers: every layer decides for itself."""


@dataclass(frozen=True)
class Settings:
    """Which variants, on how much text."""

    model: str
    family: str = "one"
    """A key of :data:`FAMILIES`."""
    num_tokens: int = 2000
    num_prompt: int = 500
    num_documents: int = 16


# -- what a block is worth --------------------------------------------------------------


def mass(
    num_queries: int = 32,
    layers: slice = slice(None),
    peak: bool = False,
    heads: str = "mean",
    log: bool = False,
) -> Rule:
    """Attention of the last queries to a block, or to its token that gets most."""

    def rule(state: State) -> Tensor:
        seen = (state.peak if peak else state.mass)[layers, ..., -num_queries:, :].mean(3)
        if log:
            seen = (seen + 1e-4).log()
        whole = seen.amax((0, 2)) if heads == "max" else seen.mean((0, 2))
        return whole.gather(1, state.blocks)

    return rule


def contribution(
    num_queries: int = 8, queries: str = "mean", heads: str = "max", floor: bool = False
) -> Rule:
    """Attention times the norm of the value, of the last queries to a block.

    Args:
        num_queries: how many.
        queries: ``mean`` or ``max`` over them.
        heads: ``mean``, ``max`` or root mean square (``rms``) over them, or the ``max`` of how
            many standard deviations a block is above the head's mean (``zmax``, as TriAttention).
        floor: nothing is worth less to a head than its blocks' mean (DefensiveKV, ICLR 2026).
    """

    def rule(state: State) -> Tensor:
        added = state.added[..., -num_queries:, :]
        by_query = added.gather(4, state.blocks[None, :, None, None].expand(*added.shape[:4], -1))
        by_head = by_query.amax(3) if queries == "max" else by_query.mean(3)
        if floor:
            by_head = by_head.maximum(by_head.mean(3, keepdim=True))
        if heads == "zmax":
            by_head = (by_head - by_head.mean(3, keepdim=True)) / by_head.std(3, keepdim=True)
        if heads == "rms":
            return by_head.square().mean(2).sqrt().mean(0)
        return (by_head.mean(2) if heads == "mean" else by_head.amax(2)).mean(0)

    return rule


def similar(
    num_queries: int = 1, dot: bool = False, layers: slice = slice(None), theta: float | None = None
) -> Rule:
    """Cosine, or dot product, of the mean of the last queries and a block's mean key.

    ``theta``, the base of RoPE, takes the rotation out of both first.
    """

    def rule(state: State) -> Tensor:
        keys = state.keys()
        queries = state.queries[..., -num_queries:, :]
        if theta is not None:
            positions = tokens_of(state.blocks).unflatten(1, (-1, BLOCK_SIZE)).unsqueeze(1)
            keys = unrotated(keys, positions, theta)
            first = state.point - queries.shape[3]
            queries = unrotated(queries, torch.arange(first, state.point), theta)
        query = queries.mean(3).unflatten(2, (keys.shape[2], -1)).mean(3).unsqueeze(3)
        key = keys.mean(4)
        both = (query * key).sum(-1) if dot else cosine_similarity(query, key, dim=-1)
        return both[layers].mean((0, 2))

    return rule


def topic(sign: int) -> Rule:
    """Likeness of a block's mean value in the first layer to the recent window's."""

    def rule(state: State) -> Tensor:
        recent = state.gather(state.recent, True)[0].mean((2, 3)).unsqueeze(2)
        return sign * cosine_similarity(recent, state.values()[0].mean(3), dim=-1).mean(1)

    return rule


def novelty(layers: slice) -> Rule:
    """Unlikeness of a block's mean value to that of the most similar other block."""

    def rule(state: State) -> Tensor:
        value = state.values()[layers].mean(4)  # [layers, num_docs, num_kv_heads, n, head_size]
        unit = normalize(value - value.mean(3, keepdim=True), dim=-1)
        alike = (unit @ unit.transpose(3, 4)).mean((0, 2))
        alike.diagonal(dim1=1, dim2=2).fill_(-1)
        return -alike.amax(2)

    return rule


def by_norm(values: bool, sign: int) -> Rule:
    """Norm of a block's keys or values."""

    def rule(state: State) -> Tensor:
        kept = state.values() if values else state.keys()
        return sign * kept.norm(dim=-1).mean((0, 2, 4))

    return rule


def drawn(state: State) -> Tensor:
    """A lot that each block draws once."""
    generator = torch.Generator().manual_seed(0)
    lots = torch.rand(len(state.blocks), 1 + int(state.blocks.max()), generator=generator)
    return lots.gather(1, state.blocks)


def decayed(rule: Rule, decay: float) -> Rule:
    """The sum over all points so far, those before weighed down."""

    def wrapped(state: State) -> Tensor:
        scores = rule(state)
        size = (len(scores), state.mass.shape[-1])
        total = state.memory.setdefault("total", torch.zeros(size))
        total *= decay
        total.scatter_add_(1, state.blocks, scores)
        return total.gather(1, state.blocks)

    return wrapped


def unrotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Take RoPE out of x [..., n, head_size] at positions that broadcast to [..., n]."""
    half = x.shape[-1] // 2
    angle = positions.unsqueeze(-1) * theta ** (-torch.arange(half) / half)
    cos, sin = (torch.cat((of, of), dim=-1) for of in (angle.cos(), angle.sin()))
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((high, -low), dim=-1) * sin


STUDY = BlockBudget(sink=1, recent=2, selected=6)
AGE = "age: 1 sink + 8 recent (streaming)"


@dataclass(frozen=True)
class Variant:
    """What a row of the table keeps."""

    rule: Rule | None
    """``None``: age."""
    split: BlockBudget = STUDY
    num_groups: int = 1
    """Of layers that keep blocks of their own."""
    skew: int = 0
    """Blocks that the last of them selects more, and the first fewer."""


def of_one_decision(theta: float) -> dict[str, Variant]:
    """What is tried with one decision for all layers, by what it is called in the table."""
    middle = slice(1, None)
    return {
        AGE: Variant(None, BlockBudget(1, 8, 0)),
        "age: 0 sinks + 9 recent": Variant(None, BlockBudget(0, 9, 0)),
        "age: 1 sink + 16 recent (1.9 x the budget)": Variant(None, BlockBudget(1, 16, 0)),
        "random, 2 recent": Variant(drawn),
        "random, 4 recent": Variant(drawn, BlockBudget(1, 4, 4)),
        "cosine of the newest query (the study)": Variant(similar()),
        "cosine of the mean of 32 queries": Variant(similar(32)),
        "cosine of 32, before RoPE": Variant(similar(32, theta=theta)),
        "cosine of 32, first layer": Variant(similar(32, layers=slice(1))),
        "cosine of 32, decay 0.8": Variant(decayed(similar(32), 0.8)),
        "dot product of the newest query": Variant(similar(dot=True)),
        "dot product of 32": Variant(similar(32, dot=True)),
        "like the recent values": Variant(topic(1)),
        "unlike the recent values": Variant(topic(-1)),
        "unlike any other block, first layer": Variant(novelty(slice(1))),
        "unlike any other block, all layers": Variant(novelty(slice(None))),
        "small keys": Variant(by_norm(values=False, sign=-1)),
        "large values": Variant(by_norm(values=True, sign=1)),
        "attention of the newest query": Variant(mass(1)),
        "attention of the newest query, decay 0.8": Variant(decayed(mass(1), 0.8)),
        "attention of the newest query, decay 0.95": Variant(decayed(mass(1), 0.95)),
        "attention of 8": Variant(mass(8)),
        "attention of 8, decay 0.8": Variant(decayed(mass(8), 0.8)),
        "attention of 32": Variant(mass(32)),
        "attention of 32, decay 0.8": Variant(decayed(mass(32), 0.8)),
        "attention of 32, sum (H2O)": Variant(decayed(mass(32), 1.0)),
        "attention of 32, decay 0.8, best head": Variant(decayed(mass(32, heads="max"), 0.8)),
        "attention of 32, decay 0.8, log": Variant(decayed(mass(32, log=True), 0.8)),
        "attention of 32, decay 0.8, not the first layer": Variant(decayed(mass(32, middle), 0.8)),
        "best token, 32, decay 0.9, not the first layer": Variant(
            decayed(mass(32, middle, peak=True), 0.9)
        ),
        "attention of 8, decay 0.8, 4 recent": Variant(decayed(mass(8), 0.8), BlockBudget(1, 4, 4)),
        "attention of 8, decay 0.8, no sink": Variant(decayed(mass(8), 0.8), BlockBudget(0, 2, 7)),
    }


def of_groups(theta: float) -> dict[str, Variant]:
    """What is tried where groups of layers decide: on a model of 30 layers."""
    wide = BlockBudget(1, 4, 4)
    attention, best = decayed(mass(8), 0.8), decayed(contribution(), 0.9)
    floored = contribution(32, queries="max", floor=True)
    each = {
        "mean over heads": decayed(contribution(heads="mean"), 0.9),
        "root mean square over heads": decayed(contribution(heads="rms"), 0.9),
        "highest z-score of a head": decayed(contribution(heads="zmax"), 0.9),
        "decay 0.95": decayed(contribution(), 0.95),
        "4 queries": decayed(contribution(4), 0.9),
        "32 queries": decayed(contribution(32), 0.9),
        "highest of 32 queries": decayed(contribution(32, queries="max"), 0.9),
        "highest of 32, at least the mean of the blocks": decayed(floored, 0.9),
    }
    return {
        AGE: Variant(None, BlockBudget(1, 8, 0)),
        "attention of 8, decay 0.8, one decision": Variant(attention),
        "contribution, highest head, decay 0.9, recent 128, 5 groups (A)": Variant(best, wide, 5),
        "A, 15 groups": Variant(best, wide, 15),
        "A, each layer": Variant(best, wide, EACH),
        **{f"A, each layer, {name}": Variant(rule, wide, EACH) for name, rule in each.items()},
        "A, each layer, recent 96": Variant(best, BlockBudget(1, 3, 5), EACH),
        "A, each layer, recent 160": Variant(best, BlockBudget(1, 5, 3), EACH),
        "A, 3 groups, skew 96": Variant(best, wide, 3, 3),
        "A, 6 groups, skew 128": Variant(best, wide, 6, 4),
        "A, 15 groups, skew 128": Variant(best, wide, 15, 4),
        "A, 15 groups, skew -128": Variant(best, wide, 15, -4),
        "A, each layer, skew 128": Variant(best, wide, EACH, 4),
        "attention of 8, decay 0.8, recent 128, 15 groups, skew 128": Variant(
            attention, wide, 15, 4
        ),
    }


FAMILIES = {"one": of_one_decision, "groups": of_groups}


# -- the run ----------------------------------------------------------------------------


def run(settings: Settings, out: Path = RESULTS / "variants.json") -> dict[str, Any]:
    """Measure every variant, print the table, keep the JSON."""
    decoder = PagedDecoder(settings.model)
    found = {
        name: texts.documents(name, settings.model, settings.num_tokens)[: settings.num_documents]
        for name in TEXTS
    }
    documents = torch.tensor([document for of in found.values() for document in of])
    theta = decoder.model.config.rope_parameters["rope_theta"]
    console = Console()
    losses: dict[str, Tensor] = {}
    chosen = FAMILIES[settings.family](theta)
    with progress_bar(console) as progress:
        task = progress.add_task("the full cache", total=1 + len(chosen))
        losses["full"] = decoder.losses(documents, settings.num_prompt)
        for name, variant in chosen.items():
            progress.update(task, advance=1, description=name)
            losses[name] = decoder.losses(
                documents,
                settings.num_prompt,
                variant.split,
                variant.rule,
                variant.num_groups or decoder.num_layers,
                variant.skew,
            )
        progress.advance(task)
    report = summarise(settings, losses, {name: len(of) for name, of in found.items()})
    console.print(_table(report))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def summarise(
    settings: Settings, losses: dict[str, Tensor], sizes: dict[str, int]
) -> dict[str, Any]:
    """Per variant and text: perplexity, excess over full by streaming's, difference to it."""
    report: dict[str, Any] = {
        "context": context(**asdict(settings), budget=[BUDGET]),
        "documents": sizes,
        "rows": {},
    }
    streaming = next(name for name in losses if name != "full")
    parts = {
        name: dict(zip(sizes, of.double().split(list(sizes.values())), strict=True))
        for name, of in losses.items()
    }
    for name, of in parts.items():
        row: dict[str, Any] = {}
        for text, mine in of.items():
            full, age = parts["full"][text], parts[streaming][text]
            row[text] = {
                "perplexity": math.exp(float(mine.mean())),
                "excess_ratio": excess(mine, full) / excess(age, full),
                "minus_streaming": asdict(paired_difference(mine.tolist(), age.tolist())),
            }
        report["rows"][name] = row
    return report


def excess(losses: Tensor, full: Tensor) -> float:
    """Perplexity over the full cache's, minus one."""
    return math.expm1(float(losses.mean() - full.mean()))


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="excess of the perplexity over the full cache's, by streaming's")
    table.add_column("variant")
    for text in report["documents"]:
        table.add_column(f"PPL {text}", justify="right")
        table.add_column("excess", justify="right")
    for name, row in report["rows"].items():
        cells = [(f"{c['perplexity']:.2f}", f"{c['excess_ratio']:.2f}") for c in row.values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    return table
