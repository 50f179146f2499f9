"""The `expertmesh` command: finds the subcommand. Each is a file in `cluster/commands`.

Exit codes: 0 done · 1 it could not be done · 2 what was asked for cannot be accepted · 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cluster.commands import bench, drain, make_checkpoint, rebalance, scale, serve, simulate, status, trace
from cluster.config import ConfigError
from cluster.version import VERSION

_COMMANDS = (serve, status, scale, drain, rebalance, trace, make_checkpoint, bench, simulate)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="expertmesh",
        description="Serves MiniMax-M2-family models with attention and experts on separate pools of workers.",
        epilog="Begin with:  expertmesh make-checkpoint --preset demo --out checkpoints/demo\n"
        "             expertmesh serve --model checkpoints/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"expertmesh {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
