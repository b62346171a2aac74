"""Random lives of the managers and schedulers for as long as one likes, never the same twice.

The machines of ``make test``, which takes the same few each time; ends with an error, and the
shortest life that shows it, where an invariant is broken.

    python -m tests.property --minutes 480 --out lives.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from .. import conftest  # noqa: F401  (settings that must precede vLLM)
from ..models import make_llama
from .lives import run_lives
from .test_manager_machine import ManagerMachine
from .test_scheduler_machine import AMPLE, TIGHT, SchedulerMachine


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.property",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=480)
    parser.add_argument("--out", type=Path, help="a JSON file for what was seen")
    arguments = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns of each reset of a pool in use
    until = time.monotonic() + 60 * arguments.minutes
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        machines: dict[str, Any] = {"manager": ManagerMachine}
        llama = make_llama(Path(folder))
        for how, policies in {"tight": TIGHT, "ample": AMPLE}.items():
            for asynchronous in (False, True):
                name = f"{'asynchronous' if asynchronous else 'synchronous'} scheduler, {how}"
                machines[name] = partial(SchedulerMachine, llama, asynchronous, policies)
        for name, machine in itertools.cycle(machines.items()):
            if time.monotonic() > until:
                break
            run_lives(partial(machine, seen[name]), 100, repeat=False)
            seen[name]["lives"] += 100
            if arguments.out:
                arguments.out.write_text(json.dumps(seen, indent=1) + "\n")
    print(json.dumps(seen, indent=1))
    print(f"{sum(counts['steps'] for counts in seen.values())} steps, no invariant broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
