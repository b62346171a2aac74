"""Random lives of the managers and schedulers for as long as one likes, never the same twice.

The machines of ``make test``, which takes the same few each time; ends with an error, and the
shortest life that shows it, where an invariant is broken.

    python -m tests.property --minutes 480 --out lives.json
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.context import context

from .. import conftest  # noqa: F401  (settings that must precede vLLM)
from ..long_runs import parser_of, report
from ..models import make_llama
from .lives import run_lives
from .test_manager_machine import ManagerMachine
from .test_scheduler_machine import AMPLE, TIGHT, SchedulerMachine


def main() -> None:
    parser = parser_of("tests.property", __doc__)
    parser.add_argument("--minutes", type=float, default=480)
    arguments = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns of each reset of a pool in use
    until = time.monotonic() + 60 * arguments.minutes
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        machines: dict[str, Any] = {"manager": ManagerMachine}
        llama = make_llama(Path(folder) / "llama")
        for how, policies in {"tight": TIGHT, "ample": AMPLE}.items():
            for asynchronous in (False, True):
                name = f"{'asynchronous' if asynchronous else 'synchronous'} scheduler, {how}"
                machines[name] = partial(SchedulerMachine, llama, asynchronous, policies)
        for name, machine in itertools.cycle(machines.items()):
            if time.monotonic() > until:
                break
            run_lives(partial(machine, seen[name]), 100, repeat=False)
            seen[name]["lives"] += 100
        result = {
            "lives": sum(counts["lives"] for counts in seen.values()),
            "steps": sum(counts["steps"] for counts in seen.values()),
            "seen": seen,
            "context": context(llama, minutes=arguments.minutes),
        }
    report(result, arguments.out)


if __name__ == "__main__":
    main()
