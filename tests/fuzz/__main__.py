"""Random requests of a server's own OpenAPI document, to a server under a policy.

Each is sent to a server without a policy as well: both have to say the same, but for refusals of
a policy, which name it. Meanwhile a witness asks the server under a policy for one long answer
again and again, which has to stay the one it got at first.

    python -m tests.fuzz --examples 300 --minutes 15
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.context import MODEL, context

from ..long_runs import parser_of, report
from ..server import SMALL_BUDGET, Server
from ..soak.work import Work
from .cases import each_of, operations
from .compare import Comparison, Witness

FLAGS = [
    *SMALL_BUDGET,
    "--max-model-len=512",
    "--num-gpu-blocks-override=64",
    "--max-num-seqs=8",
]
ENVIRONMENT = {"VLLM_MAX_N_SEQUENCES": "8"}  # else one request may ask for 16384 answers
WITNESS = Work("The sea was calm. " * 40, max_tokens=120, policy=None)
"""Longer than the budget of ``SMALL_BUDGET``."""


def main() -> int:
    parser = parser_of("tests.fuzz", __doc__)
    parser.add_argument("--examples", type=int, default=300, help="of each operation")
    parser.add_argument("--minutes", type=float, default=15, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    without = [flag for flag in FLAGS if not flag.startswith("--kv-policy")]
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(MODEL, Path(folder) / "policy", FLAGS, ENVIRONMENT) as server,
        Server(MODEL, Path(folder) / "stock", without, ENVIRONMENT) as stock,
    ):
        server.wait()
        stock.wait()
        result = fuzz(server, stock, arguments.examples, arguments.minutes, arguments.seed)
    result["context"] = context(str(MODEL), flags=FLAGS, environment=ENVIRONMENT)
    report(result, arguments.out)
    return int(bool(result["failures"]))


def fuzz(
    server: Server, stock: Server, examples: int, minutes: float, first: int
) -> dict[str, Any]:
    """Send requests of each operation in turn; what happened, for JSON."""
    began = time.monotonic()
    comparison, witness = Comparison(server, stock), Witness(server, WITNESS)
    document = json.load(urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60))
    drawn = list(operations(document, server.model))
    witness.start()
    for i, (operation, cases) in enumerate(drawn):
        until = began + 60 * minutes * (i + 1) / len(drawn)
        send = functools.partial(comparison.send, operation)
        each_of(cases, send, examples=examples, until=until, first=first)
    witness.enough.set()
    witness.join()
    alive = server.process.poll() is None
    if alive:
        server.wait_until_idle()
    result = {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "requests": sum(map(Counter.total, comparison.outcomes.values())),
        "outcomes": comparison.outcomes,
        "server_errors_of_both": comparison.server_errors,
        "differences": comparison.differences,
        "witness": witness.answers,
        "evicted_blocks": server.metric("vllm:kv_policy_evicted_blocks_total") if alive else None,
        "alive_at_end": alive,
        "kv_cache_usage_at_end": server.metric("vllm:kv_cache_usage_perc") if alive else None,
    }
    return result | {"failures": failures(result)}


def failures(result: dict[str, Any]) -> list[str]:
    """What should not have happened in a run."""
    found = [f"{d['operation']}: {d['with']}; alone: {d['without']}" for d in result["differences"]]
    found += [f"witness: {what}" for what in result["witness"] if what not in ("equal", "near tie")]
    if not result["witness"]:
        found.append("the witness got no answer")
    if not result["alive_at_end"]:
        found.append("the server is dead")
    elif result["kv_cache_usage_at_end"]:
        found.append("blocks are held at the end")
    elif not result["evicted_blocks"]:
        found.append("nothing was evicted")
    return found


if __name__ == "__main__":
    sys.exit(main())
