"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

from . import (
    demo,
    figures,
    gpu,
    models,
    overhead,
    quality,
    readme,
    shapes,
    turns,
    variants,
)
from .context import MODEL, RESULTS

MODELS = "a folder, a name of a hub, or smollm2, which is fetched once; default: the bundled model"


class Task(NamedTuple):
    """What ``--help`` says of a task."""

    purpose: str
    takes: str
    """On two cores."""
    writes: str = "benchmarks/results/{task}.json"


TASKS = {
    "demo": Task("perplexity, speed, memory and answers under each policy", "5 minutes"),
    "figures": Task(
        "throughput, decode step, host time, and what a KV memory holds, against stock vLLM",
        "45 minutes, a task alone 1 to 20",
    ),
    "overhead": Task("what the policy adds to a step on the host, without a model", "1 minute"),
    "quality": Task(
        "perplexity and recall under each policy, with intervals",
        "a row takes 1 minute on the bundled model, 15 on SmolLM2",
        "benchmarks/results/quality.json and plots beside it",
    ),
    "turns": Task(
        "facts asked for with a document and in a later turn", "15 minutes a length on SmolLM2"
    ),
    "variants": Task("variants of the semantic rule, without an engine", "1 minute a row"),
    "gpu": Task(
        "correctness and speed on one GPU, random weights",
        "6 minutes",
        "benchmarks/results/figures-gpu.json",
    ),
    "models": Task(
        "fetch and convert the model that --model smollm2 names",
        "1 minute",
        "~/.cache/vllm-semantic",
    ),
    "readme": Task(
        "make the tables from benchmarks/results", "seconds", "README.md and docs/, between marks"
    ),
}

HELP = {
    name: f"{task.purpose}; {task.takes}; writes {task.writes.format(task=name)}"
    for name, task in TASKS.items()
}


def _names(value: str) -> tuple[str, ...]:
    return tuple(name for name in value.split(",") if name)


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _names(value))


def _model(value: str) -> str:
    try:
        return models.path_of(value)
    except models.UnavailableModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures of the KV policies. A JSON has what was measured with its context; "
        "--out puts it elsewhere. TASK --help has the options.",
    )
    tasks = parser.add_subparsers(dest="task", required=True)

    task = tasks.add_parser("demo", help=HELP["demo"])
    task.add_argument("--model", type=_model, default=str(MODEL), help=MODELS)
    task.add_argument("--num-tokens", type=int, default=demo.Settings.num_tokens)
    task.add_argument("--num-prompt", type=int, default=demo.Settings.num_prompt)
    task.add_argument("--num-documents", type=int, default=demo.Settings.num_documents)
    task.add_argument(
        "--real-tokens",
        type=int,
        default=demo.Settings.real_tokens,
        help="of the document that SmolLM2 is asked about; 0: not at all. default: %(default)s",
    )
    task.add_argument("--out", type=Path, default=RESULTS / "demo.json")

    task = tasks.add_parser("figures", help=HELP["figures"])
    task.add_argument("--model", type=_model, default=str(MODEL), help=MODELS)
    task.add_argument("--rounds", type=int, default=4)
    task.add_argument("--out", type=Path, help="default: results/figures.json; --quick: none")
    task.add_argument(
        "--only",
        action="append",
        choices=figures.TASKS,
        help="measure this task alone and leave the others' results as they are; repeatable",
    )
    task.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, no figures")

    task = tasks.add_parser("overhead", help=HELP["overhead"])
    task.add_argument("--model", type=_model, default=str(MODEL), help=MODELS)
    task.add_argument("--batches", type=_numbers, default=overhead.BATCHES)
    task.add_argument("--contexts", type=_numbers, default=overhead.CONTEXTS)
    task.add_argument("--layer-groups", type=_numbers, default=overhead.GROUPS)
    task.add_argument("--rounds", type=int, default=9)
    task.add_argument("--out", type=Path, default=RESULTS / "overhead.json")

    task = tasks.add_parser("quality", help=HELP["quality"])
    default = quality.Settings(str(MODEL))
    task.add_argument("--model", type=_model, default=default.model, help=MODELS)
    for name, of in (("policies", _names), ("quantization", _names), ("tasks", _names)):
        values = ",".join(getattr(default, name))
        held = "; weights, and with fp8 or +fp8 the cache" if name == "quantization" else ""
        task.add_argument(
            f"--{name}",
            type=of,
            action="extend",
            help=f"by commas or repeated; default: {values}{held}",
        )
    task.add_argument(
        "--budget", type=_numbers, action="extend", help=f"in tokens; default: {default.budget[0]}"
    )
    task.add_argument(
        "--layer-groups",
        type=_numbers,
        action="extend",
        help="groups of layers that evict for themselves; default: 1",
    )
    task.add_argument("--mode", choices=("decode", "prefill"), default=default.mode)
    numbers = ("layer_skew_tokens", "num_tokens", "num_prompt", "max_documents", "questions")
    for name in (*numbers, "recall_gib", "recall_blocks", "block_size", "seed"):
        flag = f"--{name.replace('_', '-')}"
        task.add_argument(
            flag, type=int, default=getattr(default, name), help="default: %(default)s"
        )
    task.add_argument("--dtype", default=default.dtype)
    task.add_argument("--preset", choices=quality.PRESETS, help="overrides what it names")
    task.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    task.add_argument(
        "--figures", action="store_true", help="put the headline into results/figures.json"
    )

    task = tasks.add_parser("turns", help=HELP["turns"])
    asked = turns.Settings(str(MODEL))
    task.add_argument("--model", type=_model, default=asked.model, help=MODELS)
    task.add_argument("--policies", type=_names, default=asked.policies)
    task.add_argument("--budget", type=_numbers, default=asked.budget, help="in tokens")
    task.add_argument("--num-tokens", type=_numbers, default=asked.num_tokens)
    for name in ("questions", "layer_groups", "layer_skew_tokens", "recall_gib", "seed"):
        flag = f"--{name.replace('_', '-')}"
        task.add_argument(flag, type=int, default=getattr(asked, name), help="default: %(default)s")
    task.add_argument("--dtype", default=asked.dtype)
    task.add_argument("--out", type=Path, default=RESULTS / "turns.json")
    task.add_argument(
        "--figures", action="store_true", help="put the headline into results/figures.json"
    )

    task = tasks.add_parser("variants", help=HELP["variants"])
    task.add_argument("--model", type=_model, default=str(MODEL), help=MODELS)
    task.add_argument("--family", choices=variants.FAMILIES, default=variants.Settings.family)
    for name in ("num_tokens", "num_prompt", "num_documents"):
        value = getattr(variants.Settings, name)
        task.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    task.add_argument("--out", type=Path, default=RESULTS / "variants.json")

    task = tasks.add_parser("gpu", help=HELP["gpu"])
    task.add_argument("--model", action="append", choices=shapes.SHAPES, help="repeatable")
    task.add_argument("--kind", action="append", choices=gpu.KINDS, help="repeatable")
    task.add_argument("--policy", action="append", help="repeatable; default: semantic")
    task.add_argument("--seconds", type=float, default=gpu.SECONDS, help="for all of it")
    task.add_argument("--only", action="append", default=[], help="a task or check; repeatable")
    task.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, no figures")
    task.add_argument("--out", type=Path, help="default: results/figures-gpu.json; --quick: none")

    tasks.add_parser("models", help=HELP["models"])

    tasks.add_parser("readme", help=HELP["readme"])

    args = parser.parse_args()
    if args.task == "demo":
        demo.run(
            demo.Settings(
                args.model, args.num_tokens, args.num_prompt, args.num_documents, args.real_tokens
            ),
            args.out,
        )
    elif args.task == "figures":
        sizes = figures.QUICK if args.quick else figures.Sizes()
        out = args.out or (None if args.quick else RESULTS / "figures.json")
        figures.run(args.model, args.rounds, out, args.only, sizes)
    elif args.task == "overhead":
        overhead.run(
            args.model, args.batches, args.contexts, args.rounds, args.layer_groups, args.out
        )
    elif args.task == "turns":
        names = [field.name for field in dataclasses.fields(turns.Settings)]
        report = turns.run(
            turns.Settings(**{name: getattr(args, name) for name in names}), args.out
        )
        if args.figures:
            figures.add(turns.headline(report), report["context"], args.out.stem)
    elif args.task == "quality":
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(quality.Settings)}
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }
        options |= quality.PRESETS[args.preset] if args.preset else {}
        report = quality.run(quality.Settings(**options), args.out)
        if args.figures:
            figures.add(quality.headline(report), report["context"], args.out.stem)
    elif args.task == "variants":
        settings = variants.Settings(
            args.model, args.family, args.num_tokens, args.num_prompt, args.num_documents
        )
        variants.run(settings, args.out)
    elif args.task == "gpu":
        gpu.run(
            args.model or ["tiny" if args.quick else gpu.MAIN_MODEL],
            args.kind or ["bf16"],
            args.policy or ["semantic"],
            args.out or (None if args.quick else RESULTS / "figures-gpu.json"),
            args.seconds,
            args.quick,
            args.only,
        )
    elif args.task == "models":
        try:
            print(models.path_of(models.SMOLLM2))
        except models.UnavailableModelError as error:
            parser.error(str(error))
    else:
        readme.run()


if __name__ == "__main__":
    main()
