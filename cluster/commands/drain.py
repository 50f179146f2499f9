"""`expertmesh drain`: one worker of a running cluster leaves, and its pool is one smaller."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.commands.scale import add_door, resize


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "drain",
        help="have one worker leave a running cluster",
        description="Makes a pool one smaller by this worker: it is given nothing new, what it has is moved or\n"
        "finished, and then its process ends. `expertmesh scale` brings another.",
        epilog="Example:  expertmesh drain attention-1 --wait",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("worker", metavar="WORKER", help="its id, as `expertmesh status` shows it")
    add_door(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    return resize(arguments, "/v1/admin/drain", {"worker": arguments.worker})
