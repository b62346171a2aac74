"""The main job in one table: five ways to hold the same texts in memory, and what each answers.

The table is of the bundled model. A second one has what a real model, fetched once, answers about a
document that it has read before: it says four things in different places.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_semantic.recall import RECALL_GIB

from . import models, recall, statistics, texts, turns
from .context import MODEL, RESULTS, context
from .engines import engine
from .progress import progress_bar
from .rows import rows_of
from .shapes import kv_bytes

NF4 = {"quantization": "bitsandbytes"}
FP8_CACHE = {"kv_cache_dtype": "fp8"}


@dataclass(frozen=True)
class Row:
    """One way to hold a text in memory."""

    title: str
    policy: str
    engine_kwargs: dict[str, Any]


ROWS = (
    Row("full", "full", {}),
    Row("streaming", "streaming", {}),
    Row("semantic", "semantic", {}),
    Row("NF4 + semantic", "semantic", NF4),
    Row("NF4 + fp8 cache + semantic", "semantic", NF4 | FP8_CACHE),
)


@dataclass(frozen=True)
class Settings:
    """How much text, and how."""

    model: str = str(MODEL)
    num_tokens: int = 1500
    num_prompt: int = 500
    num_documents: int = 2
    real_tokens: int = 1500
    """Of the document that the real model is asked about; 0: it is not."""


NEXT = """\
What to try next, in this environment (source .venv/bin/activate):
  vllm serve MODEL --kv-policy semantic
  vllm serve MODEL --kv-policy semantic --kv-policy-config.recall_gib 16
  python -m vllm_semantic doctor MODEL --kv-policy semantic     what would run, before it does
  python -m benchmarks quality --model MODEL                    what a model of yours loses"""

REAL_POLICIES = ("full", "streaming", "semantic", "semantic:recall")
NF4_POLICIES = ("full", "semantic:recall")
REAL_BUDGET = 264


def run(settings: Settings, out: Path | None = RESULTS / "demo.json") -> dict[str, Any]:
    """Start an engine for each row, measure it, print the tables, keep the JSON."""
    from transformers import AutoTokenizer

    corpora = {
        name: texts.documents(name, settings.model, settings.num_tokens)[: settings.num_documents]
        for name in ("wikitext", "pg19")
    }
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    question = _question(settings, tokenizer, corpora["pg19"])
    console = Console()
    rows = []
    shown = [row for row in ROWS if runs_fp8() or "kv_cache_dtype" not in row.engine_kwargs]
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(shown) * 3)
        for row in shown:
            progress.update(task, description=f"{row.title}: starting vLLM")
            with engine(
                settings.model,
                row.policy,
                dtype="bfloat16",
                max_model_len=settings.num_tokens,
                max_num_batched_tokens=settings.num_tokens,  # the question is read with the rest
                kv_cache_memory_bytes=_kv_bytes(settings),
                enforce_eager=True,
                **({"block_size": 32} if row.policy == "full" else {}),
                **row.engine_kwargs,
            ) as side:
                progress.update(task, advance=1, description=f"{row.title}: reading")
                measured = side.nll(
                    [document for documents in corpora.values() for document in documents],
                    settings.num_prompt,
                )
                losses = iter(measured["nll"])
                perplexity = {
                    name: statistics.perplexity([next(losses) for _ in documents])
                    for name, documents in corpora.items()
                }
                progress.update(task, advance=1, description=f"{row.title}: answering")
                (answer,) = side.tokens([question.prompt_token_ids], len(question.answer_token_ids))
                num_tokens = settings.num_tokens * sum(map(len, corpora.values()))
                stats, memory = side.stats(), side.memory()
                peak = stats["peak_kv_blocks"] * memory["kv_pool"] / (stats["num_blocks"] + 1)
                rows.append(
                    {
                        "row": row.title,
                        "peak_kv_bytes": peak,
                        "perplexity": perplexity,
                        "tokens_per_second": num_tokens / measured["seconds"],
                        "answer": tokenizer.decode(answer).strip(),
                        "right": answer == question.answer_token_ids,
                    }
                    | stats
                )
                progress.advance(task)
    report = {
        "context": context(**vars(settings)),
        "question": tokenizer.decode(question.prompt_token_ids).rpartition("\n")[2].strip(),
        "expected": tokenizer.decode(question.answer_token_ids).strip(),
        "rows": rows,
    }
    console.print(_table(report))
    console.print(_answers(report))
    if settings.real_tokens and (real := ask_real_model(settings.real_tokens, console)):
        report["real"] = real
        console.print(_real_answers(real))
    console.print(NEXT, highlight=False, soft_wrap=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def ask_real_model(num_tokens: int, console: Console) -> dict[str, Any] | None:
    """What SmolLM2 answers about a document that it has read in an earlier turn, under each policy.

    Returns:
        ``None``, and a word to the console, where the model cannot be had.
    """
    from transformers import AutoTokenizer

    try:
        model = models.path_of(models.SMOLLM2)
    except models.UnavailableModelError as error:
        console.print(f"No answers of a real model: {error}")
        return None
    tokenizer = AutoTokenizer.from_pretrained(model)
    filler = texts.documents("pg19", model, num_tokens)
    needles = turns.TASKS["needles"]
    asked = recall.ask_task("needles", needles, tokenizer, filler, num_tokens, 4, seed=0)
    answers: dict[str, list[str]] = {}
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=2 * len(asked))
        for kwargs, policies in (({}, REAL_POLICIES), (NF4, NF4_POLICIES)):
            (quantization,) = kwargs.values() or ("none",)
            rows = rows_of(policies, (quantization,), (REAL_BUDGET,))
            progress.update(bar, description=f"{models.CHECKPOINT}: starting vLLM")
            kwargs = {"dtype": _fast_dtype(quantization), **kwargs}
            with turns.reader(model, num_tokens, {RECALL_GIB: 1}, **kwargs) as side:
                progress.update(bar, description=f"{models.CHECKPOINT}: asking")
                for question in asked:
                    prompt = turns.later(question, num_tokens, filler[0])
                    for row, answer in turns.ask(side, rows, question, prompt):
                        said = tokenizer.decode(answer).strip()
                        answers.setdefault(row.title((REAL_BUDGET,)), []).append(said)
                    progress.advance(bar)
    return {
        "model": models.CHECKPOINT,
        "num_tokens": num_tokens,
        "questions": [
            tokenizer.decode(q.prompt_token_ids[-q.num_question_tokens :]).strip() for q in asked
        ],
        "depths": [question.depth for question in asked],
        "expected": [tokenizer.decode(question.answer_token_ids).strip() for question in asked],
        "answers": answers,
    }


def _fast_dtype(quantization: str) -> str:
    """Many CPUs compute bfloat16 several times slower than float32; NF4 has no float32."""
    import torch

    return "bfloat16" if torch.cuda.is_available() or quantization != "none" else "float32"


def _real_answers(real: dict[str, Any]) -> Table:
    table = Table(
        title=f"{real['model']} on four facts in {real['num_tokens']} tokens, cut down to "
        f"{REAL_BUDGET} before anybody asked: {', '.join(real['expected'])}"
    )
    table.add_column("KV policy")
    for question, depth in zip(real["questions"], real["depths"], strict=True):
        table.add_column(f"{question} ({depth:.0%} in)", justify="right")
    for row, answers in real["answers"].items():
        right = zip(answers, real["expected"], strict=True)
        table.add_row(row, *(said if said == told else f"[red]{said}[/]" for said, told in right))
    return table


def _question(settings: Settings, tokenizer: Any, documents: list[list[int]]) -> recall.Question:
    """What is asked at the end of a document and said a third of the way into it."""
    return recall.questions("passkey", tokenizer, documents, settings.num_tokens, 4, seed=0)[1]


def _kv_bytes(settings: Settings) -> int:
    """For all documents of both texts, and the question."""
    num_documents = 2 * settings.num_documents + 1
    return kv_bytes(settings.model, num_documents * (settings.num_tokens + 128))


def _answers(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"A fact far back in {report['context']['num_tokens']} tokens: "
        f'"{report["question"]}" ({report["expected"]})'
    )
    table.add_column("KV policy")
    table.add_column("answer")
    for row in report["rows"]:
        table.add_row(row["row"], f"{row['answer']}  {'right' if row['right'] else 'wrong'}")
    return table


def runs_fp8() -> bool:
    """Whether vLLM keeps an fp8 cache here: on GPUs, and CPUs with AVX-512 or AMX."""
    has_avx512: bool = torch.cpu._is_avx512_supported()
    return torch.cuda.is_available() or has_avx512


def _table(report: dict[str, Any]) -> Table:
    settings = report["context"]
    table = Table(
        title=f"{settings['model']}, {settings['num_documents']} documents a text of "
        f"{settings['num_tokens']} tokens, teacher-forced after {settings['num_prompt']}"
    )
    table.add_column("KV policy")
    corpora = list(report["rows"][0]["perplexity"])
    for name in (*(f"PPL {name}" for name in corpora), "tok/s", "peak KV MB"):
        table.add_column(name, justify="right")
    for name in ("evicted blocks", "weights MB"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["row"],
            *(f"{row['perplexity'][name]:.2f}" for name in corpora),
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_kv_bytes'] / 1e6:.1f}",
            str(row["evicted_blocks"]),
            f"{row['weight_bytes'] / 1e6:.1f}",
        )
    return table
