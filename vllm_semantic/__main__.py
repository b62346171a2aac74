"""``python -m vllm_semantic doctor``."""

from __future__ import annotations

import argparse
import sys

from . import doctor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_semantic")
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
    options, flags = parser.parse_known_args()
    if not sys.flags.safe_path:
        del sys.path[0]  # `-m` put this folder there; `vllm serve` would not look in it
    return doctor.main(flags, options.json)


if __name__ == "__main__":
    sys.exit(main())
