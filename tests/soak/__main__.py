"""A real server under mixed load for a long time.

Many clients at once ask for short and long completions under policies of their own, on a pool
so small that they preempt each other. A fifth of them hang up, before the first token or among
tokens. The server is ended by SIGTERM under load and started again; clients try again. Every
greedy answer has to be the one the server gave to the same request alone.

    python -m tests.soak --minutes 30 --requests 5000
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.context import MODEL, ROOT, context

from ..long_runs import parser_of, report
from ..server import HOST_MIB, Server
from .clients import RSS_GROWTH_MIB, SECONDS_TO_EXIT, Plan, Soak, failures
from .work import ENVIRONMENT, FLAGS, Work, catalogue


def main() -> int:
    parser = parser_of("tests.soak", __doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--different", type=int, default=70, help="requests to draw from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--host-mib",
        type=int,
        default=HOST_MIB,
        help="host memory for evicted blocks; with little, answers may differ where it was full, "
        "and are counted",
    )
    arguments = parser.parse_args()
    plan = Plan(
        arguments.requests, arguments.minutes, seed=arguments.seed, host_mib=arguments.host_mib
    )
    flags = [*FLAGS, f"--kv-policy-config.recall_gib={arguments.host_mib / 1024}"]
    works = catalogue(arguments.different, plan.seed, ROOT / "benchmarks" / "texts" / "pg19")
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(MODEL, Path(folder) / "log", flags, ENVIRONMENT) as server,
    ):
        server.wait()
        result = asyncio.run(soak(plan, server, works))
    result["allowed"] = {"seconds_to_exit": SECONDS_TO_EXIT, "rss_growth_mib": RSS_GROWTH_MIB}
    result["failures"] = failures(result)
    result["context"] = context(str(MODEL), flags=flags, environment=ENVIRONMENT)
    report(result, arguments.out)
    return int(bool(result["failures"]))


async def soak(plan: Plan, server: Server, works: list[Work]) -> dict[str, Any]:
    return await Soak(plan, server, works).run()


if __name__ == "__main__":
    sys.exit(main())
