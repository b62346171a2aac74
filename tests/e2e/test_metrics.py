"""What a policy says of itself: metrics and log lines, held against what the scheduler did."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vllm import SamplingParams

from vllm_semantic import retention

from ..engines import engine, manager_of, scheduler_of
from ..models import random_prompts

SEMANTIC = {"sink_tokens": 32, "recent_tokens": 64, "semantic_tokens": 96}
PROMPTS = random_prompts([700, 40, 1100])
PARAMS = SamplingParams(max_tokens=70, temperature=0, ignore_eos=True, detokenize=False)


def numbers(llm: Any) -> dict[str, Any]:
    """The policy's metrics by the end of their name; a histogram's by its count and sum."""
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        _, ours, name = metric.name.partition("vllm:kv_policy_")
        if ours:
            assert metric.labels.keys() == {"model_name", "engine", "policy"}
            assert metric.labels["policy"] == "semantic"
            found[name] = metric.value if hasattr(metric, "value") else (metric.count, metric.sum)
    return found


def num_null_blocks(llm: Any) -> int:
    tables = manager_of(llm).req_to_blocks.values()
    return sum(block.is_null for table in tables for block in table)


def test_metrics_are_what_the_scheduler_did(llama: str) -> None:
    with engine(
        llama, policy="semantic", kv_policy_config=SEMANTIC, disable_log_stats=False
    ) as llm:
        assert set(numbers(llm).values()) == {0, (0, 0)}, "there from the start"
        for i, prompt in enumerate(PROMPTS):
            llm.llm_engine.add_request(str(i), prompt, PARAMS)
        most_recovered = 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            found = numbers(llm)
            assert found["recovered_blocks"] == num_null_blocks(llm)
            most_recovered = max(most_recovered, found["recovered_blocks"])
        points = [blocks for request in llm.trace.by_index() for blocks in request.values()]
        assert found["evictions"] == len(points) > 8
        assert found["evicted_blocks"] == sum(map(len, points)) >= most_recovered > 20
        assert found["evicting_requests"] == 2
        assert found["score_age_steps"][0] == len(points)
        assert found["score_age_steps"][1] >= len(points)
        assert found["scored_blocks"] == manager_of(llm).stats.scored_blocks
        seconds = manager_of(llm).stats.scoring_microseconds / 1e6
        assert 0 < seconds < 600
        (loggers, *_) = llm.llm_engine.logger_manager.stat_loggers
        (sample,) = loggers._metrics["scoring_microseconds"].collect()[0].samples[:1]
        assert abs(sample.value - seconds) < 1e-9
    with engine(llama, disable_log_stats=False) as llm:
        llm.generate(PROMPTS[0], PARAMS, use_tqdm=False)
        assert numbers(llm) == {}, "an engine without a policy, in the same process"


@contextmanager
def debug_lines() -> Iterator[list[str]]:
    """What is logged at DEBUG under the policy; vLLM's own logger does not propagate."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_semantic.engine.explain")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)


def test_log_lines_explain_a_request(llama: str, tmp_path: Path) -> None:
    """Also without log stats, as all engines of these tests run."""
    with engine(llama, policy="semantic", kv_policy_config=SEMANTIC) as llm:
        assert scheduler_of(llm).make_stats() is None
        llm.generate(PROMPTS[0], PARAMS, use_tqdm=False)
        with debug_lines() as lines:
            llm.generate(PROMPTS[1], PARAMS, use_tqdm=False)
            assert lines == [], "it stayed within the budget"
            llm.generate(PROMPTS[0], PARAMS, use_tqdm=False)
        request_id, points = list(llm.trace.evictions.items())[-1]
        *evictions, total = lines
        for (at, blocks), line in zip(points.items(), evictions, strict=True):
            point = at - manager_of(llm).eviction_delay
            start = f"KV policy semantic: request {request_id} at token {point} evicts blocks "
            assert line.startswith(f"{start}{blocks} of KV cache group 0; scores ")
            scores = dict(pair.split(": ") for pair in line.split("; scores ")[1].split(", "))
            candidates = sorted(scores, key=lambda block: float(scores[block]))
            assert {int(block) for block in candidates[: len(blocks)]} == set(blocks)
        num_evicted = sum(map(len, points.values()))
        num_scored = manager_of(llm).stats.scored_blocks // 2  # two such requests so far
        assert total == (
            f"KV policy semantic: request {request_id} finished with 700 prompt and 70 output "
            f"tokens: {num_evicted} blocks evicted, {-(-769 // 32) - num_evicted} held, "
            f"{num_scored} scored in KV cache group 0"
        )
        served, block_size = scheduler_of(llm).served_policies, manager_of(llm).block_size
        log = [served.describe_default(block_size), *lines]
    check_picture(log, points, block_size, tmp_path)


def check_picture(
    log: list[str], points: dict[int, list[int]], block_size: int, folder: Path
) -> None:
    """What is drawn from the log: every block that went, once, and none of it later."""
    (folder / "log").write_text("\n".join(f"DEBUG 11-28 [explain.py:35] {line}" for line in log))
    said = retention.write(folder / "log", folder / "page.html", None, None)
    assert said.endswith(f"{len(points)} eviction points")
    page = (folder / "page.html").read_text().removeprefix("<!doctype html>\n")
    fills: dict[str, list[tuple[int, int]]] = {}
    for cell in ElementTree.fromstring(page).iter("{http://www.w3.org/2000/svg}rect"):
        place = (int(cell.attrib["y"]) // retention.CELL, int(cell.attrib["x"]) // retention.CELL)
        fills.setdefault(cell.attrib["fill"], []).append(place)
    went = {(row, block) for row, blocks in enumerate(points.values()) for block in blocks}
    assert set(fills["#d62728"]) == went
    assert set(fills["#f4f4f4"]) == {
        (later, block) for row, block in went for later in range(row + 1, len(points))
    }
