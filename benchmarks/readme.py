"""Writes the tables of README.md and docs/ from the committed results."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from . import figures, turns
from .context import RESULTS, ROOT
from .statistics import difference, excess_ratio

FIGURES = {
    "no_eviction_throughput_ratio": "budget never reached: throughput over stock",
    "kv_bound_throughput_ratio": "64 requests on a KV pool for 8 full ones: throughput over stock",
    "kv_bound_ideal_ratio": "the same, stock with a pool for all 64 (no eviction, 8 x the memory)",
    "decode_flatness_4k_over_512": "decode step at 4k of context over one at 512",
    "decode_flatness_4k_over_512_stock": "the same, stock",
    "scoring_share_of_step": "scoring and eviction, share of a decode step",
    "compaction_share_of_step": "table compaction, share of a decode step",
    "host_step_over_stock_idle_256": "scheduler's part of a step of 256 requests over stock's, "
    "budget never reached",
    "host_step_over_stock_evicting_256": "the same, every request over its budget",
    "host_step_over_stock_evicting_256_2_groups": "the same, in 2 groups of layers",
    "host_step_over_stock_evicting_256_4_groups": "the same, in 4 groups",
    "host_step_over_stock_evicting_256_8_groups": "the same, in 8 groups",
}

PAIRS = (
    "full - streaming",
    "full - semantic:attention",
    "streaming - semantic:attention",
    "semantic:attention - semantic:study",
    "streaming - NF4 + semantic:attention",
)
"""Differences that the pages show; the JSON has all."""


FEATURES_PAGE = "docs/features.md"

OVERHEAD_BATCH = 32
"""Requests of the line on the host's share."""


def run() -> None:
    """Replace what stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``."""
    tables: dict[str, list[tuple[str, str, Callable[[dict[str, Any]], str]]]] = {
        "README.md": [
            ("real", "real", _rules),
        ],
        "docs/speed.md": [
            ("figures", "figures", _figures),
            ("capacity", "figures", _capacity),
            ("overhead", "overhead", _overhead),
        ],
        "docs/quality.md": [
            ("demo", "demo", demo_table),
            ("answers", "demo", answers_table),
            ("real-one-group", "real-one-group", _rules),
            ("real-few-groups", "real-few-groups", _rules),
            ("real-fp8", "real-fp8", _stored),
            ("turns", "turns", _turns),
            ("turns-others", "turns-others", _turns),
            ("turns-in-groups", "turns-in-groups", _turns),
            ("quality", "quality", _quality),
            ("recall", "quality", _recall),
        ],
        "docs/recall.md": [
            ("recall-turns", "recall", _turns),
            ("real-recall", "real-recall", _rules),
            ("recall-cost", "figures", _recall_cost),
        ],
        "docs/research.md": [
            ("rules", "rules", _rules),
            ("variants", "variants", _variants),
            ("search", "search", _variants),
            ("budgets", "budgets", _budgets),
            ("prefill", "prefill", _rules),
            ("real-prefill", "real-prefill", _rules),
            ("study", "study", _quality),
        ],
    }
    for file, places in tables.items():
        path = ROOT / file
        text = path.read_text()
        for name, result, render in places:
            report = json.loads((RESULTS / f"{result}.json").read_text())
            text = replaced(text, name, render(report))
        path.write_text(text)
    path = ROOT / FEATURES_PAGE
    path.write_text(replaced(path.read_text(), "features", features()))


def replaced(text: str, name: str, table: str) -> str:
    """``text`` with another table between the marks of ``name``.

    Raises:
        ValueError: there is not one such place.
    """
    parts = re.split(rf"(<!-- /?table:{name} -->)", text)
    if len(parts) != 5:
        raise ValueError(f"there is not one place for the table {name!r}")
    parts[2] = f"\n\n{table}\n\n"
    return "".join(parts)


def features() -> str:
    """What works and what is refused, with the tests that show it."""
    listed = tomllib.loads((ROOT / "tests" / "features.toml").read_text())
    rows = [
        [feature, state, ", ".join(map(_test_link, tests))]
        for state, of_state in listed.items()
        for feature, tests in of_state.items()
    ]
    return _table(["feature", "", "shown by"], rows).replace("---:", "---")


def _test_link(test: str) -> str:
    file, _, function = test.partition("::")
    name = function or file.rpartition("/")[2]
    return f"[{name.replace('[', ' (').replace(']', ')')}](../tests/{file})"


def demo_table(report: dict[str, Any]) -> str:
    """A wrong answer is struck out."""
    corpora = list(report["rows"][0]["perplexity"])
    head = ["KV policy", *(f"PPL {name}" for name in corpora)]
    head += ["tok/s", "peak KV MB", "evicted blocks", "weights MB", "answer"]
    rows = [
        [
            row["row"],
            *(f"{row['perplexity'][name]:.2f}" for name in corpora),
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_kv_bytes'] / 1e6:.1f}",
            str(row["evicted_blocks"]),
            f"{row['weight_bytes'] / 1e6:.1f}",
            row["answer"] if row["right"] else f"~~{row['answer']}~~",
        ]
        for row in report["rows"]
    ]
    settings = report["context"]
    return _table(head, rows) + (
        f"\n\n{settings['num_documents']} documents a text of {settings['num_tokens']} tokens, "
        f"teacher-forced token by token after {settings['num_prompt']}; answer: to "
        f'"{report["question"]}" at the end of such a text, which says it ({report["expected"]}) a '
        f"third of the way in; {_where(settings)}."
    )


def answers_table(report: dict[str, Any]) -> str:
    """What the real model answers; a wrong answer is struck out."""
    real = report["real"]
    head = ["KV policy"]
    for question, depth in zip(real["questions"], real["depths"], strict=True):
        head.append(f'"{question}" ({depth:.0%} in)')
    rows = [
        [
            row,
            *(
                said if said == told else f"~~{said}~~"
                for said, told in zip(answers, real["expected"], strict=True)
            ),
        ]
        for row, answers in real["answers"].items()
    ]
    return _table(head, rows) + (
        f"\n\nA turn after {real['num_tokens']} tokens of a book that says each somewhere; "
        f"{real['model']}."
    )


def _figures(report: dict[str, Any]) -> str:
    rows = [[words, f"{report[name]:.3f}"] for name, words in FIGURES.items() if name in report]
    details = {name: of for name, of in report["details"].items() if name in figures.TASKS}
    dates = [f"{name} {of['date'][:10]}" for name, of in details.items()]
    where = f"{_where(report['context'])}; measured: {', '.join(dates)}."
    return _table(["figure", "measured"], rows) + f"\n\n{where}"


def _recall_cost(report: dict[str, Any]) -> str:
    detail = report["details"]["recall_cost"]
    names = {
        "recall_decode_over_without_4k": "4096 tokens, blocks are kept",
        "recall_decode_over_without_16k": "16384 tokens, blocks are kept",
        "recall_in_answers_over_without_16k": "16384 tokens, and up to two come back at each point",
    }
    rows = [[name, f"{report[figure]:.3f}"] for figure, name in names.items()]
    return _table(["a step over one without recall", ""], rows) + f"\n\n{detail['date'][:10]}."


def _capacity(report: dict[str, Any]) -> str:
    sides = ("stock", "streaming", "semantic")
    head = ["context", *(f"fit, {side}" for side in sides), *(f"tok/s, {side}" for side in sides)]
    rows = []
    detail = report["details"]["capacity"]
    for num_tokens, row in detail["rows"].items():
        speeds = (f"{row['tokens_per_second'][side]:.0f}" for side in sides)
        counts = (_count(row["fits"][side], row["served"][side]) for side in sides)
        rows.append([num_tokens, *counts, *speeds, f"{row['over_stock']['semantic']:.1f}"])
    return _table([*head, "semantic over stock"], rows) + (
        f"\n\n{detail['kv_bytes'] >> 20} MiB of KV cache, every request decoding at the end of "
        f"its context; in brackets how many were, where reading the prompts of all would take too "
        f"long; {detail['date'][:10]}."
    )


def _count(fits: int, served: int) -> str:
    return str(fits) if served == fits else f"{fits} ({served})"


def _overhead(report: dict[str, Any]) -> str:
    """One line, of a batch of middling size; the JSON has all."""
    cells = [cell for cell in report["cells"] if cell["num_reqs"] == OVERHEAD_BATCH]
    added = ", ".join(
        f"{cell['added_microseconds']['semantic']:.0f} at {cell['num_tokens']}" for cell in cells
    )
    last = cells[-1]
    return (
        f"Microseconds that the policy adds on the host to a step of {OVERHEAD_BATCH} requests, by "
        f"tokens of context: {added}; with a budget that is never reached "
        f"{last['added_microseconds']['ample']:.0f}. vLLM's scheduler alone takes "
        f"{last['microseconds']['stock']['scheduler']:.0f}. {_where(report['context'])}."
    )


def _quality(report: dict[str, Any]) -> str:
    names = list(report["documents"])
    head = ["", *(f"PPL {name}" for name in names), "seconds", "attention ms", "tok/s"]
    head += ["weights MB", "peak KV MB"]
    rows = [
        [
            title,
            *(f"{row['perplexity'][name]:.2f}" for name in names),
            f"{row['seconds']:.0f}",
            f"{row['attention_ms']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['peak_kv_bytes'] / 1e6:.1f}",
        ]
        for title, row in report["rows"].items()
    ]
    differences = [
        [pair, *(_interval(report["differences"][pair][name]) for name in names)]
        for pair in PAIRS
        if pair in report["differences"]
    ]
    return "\n\n".join(
        (
            _table(head, rows),
            _table(["nats per token", *names], differences),
            f"{_read(report)}; below zero, the first loses less; attention: of one decode step "
            f"of one request at the end of a document; {_where(report['context'])}.",
        )
    )


def _interval(of: Mapping[str, float]) -> str:
    return f"{of['mean']:+.4f} [{of['ci_low']:+.4f}, {of['ci_high']:+.4f}]"


def _read(report: dict[str, Any]) -> str:
    """What was read under which budget."""
    settings = report["context"]
    counts = ", ".join(f"{count} of {name}" for name, count in report["documents"].items())
    budgets = ", ".join(map(str, settings["budget"]))
    return (
        f"budget {budgets}, documents of {settings['num_tokens']} tokens "
        f"({counts}), scored after {settings['num_prompt']}"
    )


def _recall(report: dict[str, Any]) -> str:
    tasks = list(next(row["recall"] for row in report["rows"].values() if "recall" in row))
    rows = [
        [
            title,
            *(
                f"{100 * c['accuracy']:.0f} % [{100 * c['ci_low']:.0f}, {100 * c['ci_high']:.0f}]"
                for c in (row["recall"][task] for task in tasks)
            ),
        ]
        for title, row in report["rows"].items()
        if "recall" in row
    ]
    settings = report["context"]
    return _table(["", *tasks], rows) + (
        f"\n\nPrompts of {settings['num_tokens']} tokens read at once, then cut down to "
        f"{settings['budget'][0]}; {settings['questions']} questions a task; 95 % Wilson "
        f"intervals; {settings['model']}."
    )


def _turns(report: dict[str, Any]) -> str:
    head, rows = turns.columns(report)
    settings = report["context"]
    groups = f" in {settings['layer_groups']} groups of layers, skew "
    groups += str(settings["layer_skew_tokens"])
    return _table(["tokens, asked", *head], rows) + (
        f"\n\nRight answers in %, {' / '.join(turns.TASKS)}, {settings['questions']} questions each"
        f"{groups if settings['layer_groups'] > 1 else ''}; {_where(settings)}."
    )


def _rules(report: dict[str, Any]) -> str:
    names = list(report["documents"])
    full = report["rows"]["full"]["perplexity"]
    age = report["rows"]["streaming"]["perplexity"]
    head = ["rule"]
    for name in names:
        head += [f"PPL {name}", "excess", "minus streaming, nats"]
    tasks = list(report["rows"]["full"].get("recall", {}))
    rows = []
    for title, row in report["rows"].items():
        cells = [title]
        for name in names:
            ppl = row["perplexity"][name]
            excess = excess_ratio(ppl, full[name], age[name])
            cells += [f"{ppl:.2f}", f"{excess:.2f}", _minus(report, title, name)]
        rows.append(cells + [f"{100 * row['recall'][task]['accuracy']:.0f} %" for task in tasks])
    asked = f"{report['context']['questions']} questions a recall task; " if tasks else ""
    return _table([*head, *tasks], rows) + (
        f"\n\n{_read(report)}; excess: of the perplexity over full, by streaming's; "
        f"{asked}{_where(report['context'])}."
    )


def _stored(report: dict[str, Any]) -> str:
    """What it costs to store keys and values, and weights, in fewer bits: each row against the same
    policy as the checkpoint has them."""
    names, tasks = list(report["documents"]), list(report["context"]["tasks"])
    tasks = [task for task in tasks if task not in names]
    head = [""]
    for name in names:
        head += [f"PPL {name}", "minus the same unquantised, nats"]
    rows = []
    for title, row in report["rows"].items():
        *quantised, policy = title.split(" + ")
        cells = [title]
        for name in names:
            cells.append(f"{row['perplexity'][name]:.2f}")
            found = quantised and difference(report["differences"], title, policy, name)
            cells.append(_interval(found) if found else "0")
        cells += [f"{100 * row['recall'][task]['accuracy']:.0f} %" for task in tasks]
        cells += [f"{row[of] / 1e6:.1f}" for of in ("weight_bytes", "peak_kv_bytes")]
        rows.append(cells)
    return _table([*head, *tasks, "weights MB", "peak KV MB"], rows) + (
        f"\n\n{_read(report)}; {report['context']['questions']} questions a recall task; "
        f"{_where(report['context'])}."
    )


def _minus(report: dict[str, Any], title: str, text: str) -> str:
    """A row's loss less streaming's, with its interval."""
    if title == "streaming":
        return "0"
    return _interval(difference(report["differences"], title, "streaming", text))


def _variants(report: dict[str, Any]) -> str:
    head = ["variant"]
    for name in report["documents"]:
        head += [f"PPL {name}", "excess", "minus streaming, nats"]
    rows = []
    for title, row in report["rows"].items():
        cells = [title]
        for c in row.values():
            cells += [
                f"{c['perplexity']:.2f}",
                f"{c['excess_ratio']:.2f}",
                _interval(c["minus_streaming"]),
            ]
        rows.append(cells)
    return _table(head, rows) + f"\n\n{_read(report)}; {_where(report['context'])}."


def _budgets(report: dict[str, Any]) -> str:
    ours = next(of for of in report["context"]["policies"] if of.startswith("semantic"))
    head = ["budget"]
    for name in report["documents"]:
        head += [f"PPL {name}, streaming", ours, "difference, nats"]
    rows = []
    for budget in report["context"]["budget"]:
        age, semantic = f"streaming @ {budget}", f"{ours} @ {budget}"
        cells = [str(budget)]
        for name in report["documents"]:
            cells += [f"{report['rows'][row]['perplexity'][name]:.2f}" for row in (age, semantic)]
            cells.append(_interval(report["differences"][f"{age} - {semantic}"][name]))
        rows.append(cells)
    full = report["rows"]["full"]["perplexity"]
    return _table(head, rows) + (
        f"\n\n{_read(report)}; the full cache: "
        f"{', '.join(f'{full[name]:.2f}' for name in report['documents'])}; "
        f"{_where(report['context'])}."
    )


def _where(context: dict[str, Any]) -> str:
    machine, versions = context["machine"], context["versions"]
    return (
        f"{context['model']}; {machine['processor']}, {machine['cores']} cores, "
        f"vLLM {versions['vllm']}, torch {versions['torch']}, {context['date'][:10]}"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
