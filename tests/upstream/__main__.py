"""Fetch and run vLLM's own tests of ``v1/core``: ``python -m tests.upstream``.

Three times: without the plugin, with it installed, and with ``SemanticSpec`` groups at an ample
budget in place of full-attention ones. Ends with 1 if a test does otherwise than without the
plugin and ``deviations.py`` has no reason for it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import source
from .deviations import DEVIATIONS, cause_of
from .models import make_models
from .suite import SUITE, WAYS, Run, run


def main() -> int:
    arguments = parse_arguments()
    archive = source.fetch(arguments.cache)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="upstream-", dir=arguments.cache) as name:
        folder = Path(name)
        source.extract_tests(archive, folder)
        make_models(folder)
        for way in arguments.ways:
            print(f"{way}: {WAYS[way].what} ...", flush=True)
            runs[way] = run(WAYS[way], folder, arguments.select)
    result = summarise(runs)
    print_result(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(not d["reason"] for d in result["deviations"]) or bool(result["stale_reasons"]))


def parse_arguments() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-semantic"
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description=__doc__)
    parser.add_argument("select", nargs="*", help=f"what of the suite to run (default: {SUITE})")
    parser.add_argument("--cache", type=Path, default=cache, help="default: %(default)s")
    parser.add_argument("--ways", type=_ways, default=list(WAYS), help=",".join(WAYS))
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    return arguments


def _ways(text: str) -> list[str]:
    wanted = text.split(",")
    if unknown := set(wanted) - set(WAYS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
    return [way for way in WAYS if way in wanted or way == "stock"]  # what others compare with


def summarise(runs: dict[str, Run]) -> dict[str, Any]:
    """Numbers by file, and every test that does not do what it does without the plugin."""
    stock = runs["stock"].outcomes
    deviations, stale = [], []
    for way, reasons in DEVIATIONS.items():
        if way not in runs:
            continue
        outcomes = runs[way].outcomes
        for test in sorted(stock.keys() | outcomes.keys()):
            before = stock[test].result if test in stock else "missing"
            after = outcomes[test].result if test in outcomes else "missing"
            if before != after:
                deviation = {"way": way, "test": test, "stock": before, "now": after}
                message = outcomes[test].message if test in outcomes else ""
                deviations.append(
                    deviation | {"reason": reasons.get(test, ""), "message": message[:500]}
                )
            elif test in reasons:
                stale.append(f"{way}: {test}")
    causes = Counter(cause_of(o.message) for o in stock.values() if o.result == "failed")
    return {
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers", "pytest")},
        "python": sys.version.split()[0],
        "files": {way: by_file(run) for way, run in runs.items()},
        "totals": {
            way: Counter(o.result for o in run.outcomes.values()) for way, run in runs.items()
        },
        "failed_without_the_plugin": dict(causes),
        "skipped": dict(Counter(o.message for o in stock.values() if o.result == "skipped")),
        "deviations": deviations,
        "stale_reasons": stale,
        "built": {way: run.counts for way, run in runs.items()},
        "tests_that_built": {way: tests_that_built(run) for way, run in runs.items()},
        "passed_on_a_second_try": {way: run.second_tries for way, run in runs.items()},
    }


def by_file(run: Run) -> dict[str, dict[str, int]]:
    """File -> result -> number of tests."""
    files: dict[str, Counter[str]] = {}
    for test, outcome in run.outcomes.items():
        file = test.partition("::")[0].removeprefix(f"{SUITE}/")
        files.setdefault(file, Counter())[outcome.result] += 1
    return {file: dict(files[file]) for file in sorted(files)}


def tests_that_built(run: Run) -> dict[str, int]:
    """Thing counted -> tests that built at least one."""
    return dict(Counter(name for outcome in run.outcomes.values() for name in outcome.counts))


def print_result(result: dict[str, Any]) -> None:
    """A table and what needs words."""
    ways = list(result["files"])
    print(f"\n| passed / failed / skipped | {' | '.join(ways)} |")
    print(f"| --- |{' ---: |' * len(ways)}")
    for file in sorted(set().union(*(result["files"][way] for way in ways))):
        cells = [_cell(result["files"][way].get(file, {})) for way in ways]
        print(f"| {file} | {' | '.join(cells)} |")
    print(f"| all | {' | '.join(_cell(result['totals'][way]) for way in ways)} |")
    print("\nFailed without the plugin:")
    for cause, number in result["failed_without_the_plugin"].items():
        print(f"  {number}: {cause}")
    for way in ways:
        print(f"Built, {way}: {result['built'][way]}; by tests: {result['tests_that_built'][way]}")
        if again := result["passed_on_a_second_try"][way]:
            print(f"Passed on a second try, {way}: {', '.join(again)}")
    print(f"\nDeviations from stock: {len(result['deviations'])}")
    for found in result["deviations"]:
        print(f"  {found['way']}: {found['test']}: {found['stock']} -> {found['now']}")
        print(f"    {found['reason'] or 'UNEXPLAINED: ' + found['message']}")
    for reason in result["stale_reasons"]:
        print(f"  Reason without a deviation: {reason}")


def _cell(numbers: dict[str, int]) -> str:
    return " / ".join(str(numbers.get(result, 0)) for result in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    sys.exit(main())
