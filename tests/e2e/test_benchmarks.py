"""The instrument itself: what it measures is what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks import demo, figures, quality, readme, turns
from benchmarks.context import MODEL
from benchmarks.engines import engine
from benchmarks.rows import policy_options
from vllm_semantic.config import make_policy
from vllm_semantic.policies import POLICIES, SemanticPolicy, StreamingPolicy

from ..models import random_prompts
from ..oracle import Case, judge
from ..platforms import default_block_size, eviction_delay
from .test_oracle import TOLERANCE


def test_forced_text_and_memory(llama: str) -> None:
    """Teacher-forced likelihoods are the oracle's; weights weigh what the file weighs."""
    lengths = [400, 150]
    documents = [prompt["prompt_token_ids"] for prompt in random_prompts(lengths)]
    num_prompt = 100
    with engine(
        llama,
        "streaming",
        {"recent_tokens": 64},
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=32 << 20,
        enforce_eager=True,
        skip_tokenizer_init=True,
    ) as side:
        measured = side.nll(documents, num_prompt)["nll"]
        stats = side.stats()
    verdicts = judge(
        [
            Case(
                llama,
                tokens,
                num_prompt,
                default_block_size(),
                512,
                sink_tokens=4,
                recent_tokens=64,
                eviction_delay=eviction_delay(),
            )
            for tokens in documents
        ]
    )
    for losses, verdict in zip(measured, verdicts, strict=True):
        assert [-loss for loss in losses] == pytest.approx(verdict.logprobs, abs=TOLERANCE)
    evicted = [block for v in verdicts for blocks in v.evictions.values() for block in blocks]
    assert stats["evicted_blocks"] == len(evicted) > 0
    on_disk = load_file(Path(llama) / "model.safetensors")
    assert stats["weight_bytes"] == sum(tensor.nbytes for tensor in on_disk.values())


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fact that age drops and similarity keeps; the README's table says what was answered."""
    monkeypatch.setattr(demo, "ROWS", [*demo.ROWS[1:3], demo.ROWS[-1]])
    settings = demo.Settings(num_tokens=600, num_prompt=300, num_documents=1, real_tokens=0)
    report = demo.run(settings, tmp_path / "demo.json")
    streaming, semantic, *others = report["rows"]
    assert all(row["evicted_blocks"] > 0 for row in report["rows"])
    assert (streaming["right"], semantic["right"]) == (False, True)
    assert len(others) == demo.runs_fp8()
    for nf4_and_fp8 in others:
        assert nf4_and_fp8["peak_kv_bytes"] * 2 == semantic["peak_kv_bytes"]
        assert nf4_and_fp8["weight_bytes"] < semantic["weight_bytes"]
    assert semantic["answer"] == report["expected"] != streaming["answer"]
    table = readme.demo_table(json.loads((tmp_path / "demo.json").read_text()))
    assert f"| {report['expected']} |" in table
    assert f"| ~~{streaming['answer']}~~ |" in table


def test_turns(tmp_path: Path) -> None:
    """A question that comes later finds what is left, and that is less."""
    settings = turns.Settings(
        str(MODEL), budget=(136,), num_tokens=(480,), questions=8, dtype="float32"
    )
    report = turns.run(settings, tmp_path / "turns.json")
    of_length = report["lengths"]["480"]
    assert of_length["evicted_blocks"] > 0
    at_once, later = (of_length["asked"][when] for when in (turns.AT_ONCE, turns.LATER))
    right = {row: by_task["needles"]["accuracy"] for row, by_task in at_once.items()}
    assert right["full"] >= right["semantic"] > right["streaming"]
    assert later["full"]["needles"]["accuracy"] > later["streaming"]["needles"]["accuracy"]
    head, rows = turns.columns(report)
    assert len(head) == 2
    assert [row[0] for row in rows] == ["full", "streaming", "semantic"]


def test_quality(tmp_path: Path) -> None:
    """One command, real text: what it reports hangs together."""
    settings = quality.Settings(
        str(MODEL),
        policies=("full", "streaming", "oracle"),
        quantization=("none",),
        budget=(136,),
        tasks=("wikitext", "pg19", "passkey"),
        questions=3,
        num_tokens=320,
        num_prompt=200,
        max_documents=2,
        dtype="float32",
        block_size=32,
    )
    report = quality.run(settings, tmp_path / "decode.json")
    assert (
        json.loads((tmp_path / "decode.json").read_text())["rows"].keys() == report["rows"].keys()
    )
    full, streaming = report["rows"]["full"], report["rows"]["streaming"]
    assert full["evicted_blocks"] == 0 < streaming["evicted_blocks"]
    # Foresight keeps other blocks than age does.
    oracle = report["rows"]["oracle"]
    assert oracle["evicted_blocks"] > 0
    assert oracle["perplexity"] != streaming["perplexity"] != full["perplexity"]
    # Which blocks lived: sink and recent ones always, and never more than the budget's five.
    kept, points = streaming["retention"]["kept"], streaming["retention"]["points"]
    assert points == sorted(points)
    assert all(held[0] == 0 and held == sorted(held) for held in kept)
    assert len(kept[-1]) <= 5 + 1 < len(kept[0])
    plots = {path.name for path in tmp_path.glob("decode-*.png") if path.stat().st_size > 1000}
    assert plots == {"decode-retention.png", "decode-distance.png"}
    for text, difference in report["differences"]["full - streaming"].items():
        ratio = full["perplexity"][text] / streaming["perplexity"][text]
        assert difference["mean"] == pytest.approx(math.log(ratio), rel=1e-9)
        assert difference["ci_low"] <= difference["mean"] <= difference["ci_high"]
    # With every block kept it does not matter how a text is read.
    chunked = replace(settings, policies=("full",), mode="prefill")
    read = quality.run(chunked, tmp_path / "prefill.json")["rows"]["full"]
    assert read["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)


@pytest.mark.parametrize("budget", [0, 9])
def test_a_budget_without_room_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=f"--budget {budget} is too small for semantic"):
        policy_options("semantic", budget)
    assert policy_options("semantic", 264) == SemanticPolicy().parts() | {"recall": False}
    assert policy_options("streaming", 264) == StreamingPolicy().parts()
    assert policy_options("semantic:study", 520) == {
        "sink_tokens": 8,
        "recent_tokens": 128,
        "semantic_tokens": 384,
        "similarity": "study",
        "recall": False,
    }
    assert policy_options("semantic:attention:mean:recent_tokens=64:recall", 264) == {
        "sink_tokens": 8,
        "recent_tokens": 64,
        "semantic_tokens": 192,
        "similarity": "attention",
        "heads": "mean",
        "recall": True,
    }
    for wrong in ("semantic:attentive", "semantic:recent_tokens=x", "streaming:recent_tokens=64"):
        with pytest.raises(ValueError, match=f"'{wrong.partition(':')[2]}' is no variant of it"):
            policy_options(wrong, 264)


@pytest.mark.parametrize("policy", [name for name, cls in POLICIES.items() if cls.bounded])
@pytest.mark.parametrize("budget", [136, 264, 1032])
def test_every_policy_holds_as_much(policy: str, budget: int) -> None:
    made = make_policy(policy, policy_options(policy, budget))
    for block_size in (16, 32):
        assert made.budget(block_size).total == 1 + (budget - 8) // block_size


@pytest.mark.cpu_build("a GPU has a command of its own")
def test_figures_of_speed_are_measured(tmp_path: Path) -> None:
    """At sizes that say nothing; each task asserts for itself that what it measures happened."""
    out = tmp_path / "figures.json"
    # The rest takes minutes: `python -m benchmarks figures --quick` runs all.
    tasks = ["no_eviction", "recall_cost"]
    figures.run(str(MODEL), rounds=1, out=out, only=tasks, sizes=figures.QUICK)
    report = json.loads(out.read_text())
    assert list(report["details"]) == tasks
    measured = {name: value for name, value in report.items() if isinstance(value, float)}
    assert len(measured) >= len(tasks)
    assert all(0 <= value < math.inf for value in measured.values()), measured
