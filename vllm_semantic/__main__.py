"""``python -m vllm_semantic doctor``, ``explain`` and ``watch``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import doctor, retention


def main() -> int:
    parser = argparse.ArgumentParser(prog="vllm-semantic")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "doctor",
        help="say what is installed, what the plugin does with it, and what would be refused",
        description="Checks the installation and, given a model and flags of `vllm serve`, the "
        "configuration they lead to; starts no engine. Exit code: 0 if all is well, 1 if not.",
        usage="%(prog)s [--json] [MODEL] [flags of vllm serve]",
        allow_abbrev=False,
    )
    command.add_argument("--json", action="store_true", help="the same, to be read by programs")
    command.set_defaults(run=_doctor)
    command = commands.add_parser(
        "explain",
        help="draw which blocks of a request lived, from the log of an engine",
        description="Reads the lines that the logger vllm.vllm_semantic.engine.explain writes at "
        "level DEBUG, and the start of the log; writes an HTML file that needs nothing else.",
    )
    command.add_argument("log", type=Path)
    command.add_argument("--out", type=Path, default=Path("retention.html"))
    command.add_argument("--request", help="its id; default: the one with the most evictions")
    command.add_argument("--group", type=int, help="a KV cache group; default: the first")
    command.set_defaults(run=_explain)
    command = commands.add_parser(
        "watch",
        help="show what a server under a policy is doing, from its /metrics",
        description="Requests, the KV pool, what the policies evict; until it is interrupted.",
    )
    command.add_argument("url", help="http://host:port")
    command.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    command.add_argument("--once", action="store_true", help="show the first interval and end")
    command.set_defaults(run=_watch)
    options, flags = parser.parse_known_args()
    if flags and options.run is not _doctor:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    status: int = options.run(options, flags)
    return status


def _doctor(options: argparse.Namespace, flags: list[str]) -> int:
    if not sys.flags.safe_path:
        del sys.path[0]  # `-m` put this folder there; `vllm serve` would not look in it
    return doctor.main(flags, options.json)


def _watch(options: argparse.Namespace, flags: list[str]) -> int:
    from . import watch  # prometheus_client comes with vLLM; the doctor runs without either

    return watch.main(options.url, options.every, options.once)


def _explain(options: argparse.Namespace, flags: list[str]) -> int:
    try:
        print(retention.write(options.log, options.out, options.request, options.group))
    except (retention.NoEvictionsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
