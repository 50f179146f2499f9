"""`expertmesh rebalance`: experts moved and copied to where the busiest workers are relieved."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.commands.sizes import show_size
from cluster.commands.status import Unreachable, add_gateway, fetch_document

_TIMEOUT_S = 70.0  # beyond gateway.rebalance_timeout_s
_SHOWN_MAX = 20


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "rebalance",
        help="move and copy experts to where load is least",
        description="Shows which experts expert workers would load, and what that is expected to gain, going by\n"
        "recent load; then has it done beside the work. It is in use once `expertmesh status` shows its epoch.",
        epilog="Example:  expertmesh rebalance --dry-run\n"
        "How many moves at most, and for what gain: --print-config of serve, under balancer.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_gateway(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="the whole document, for scripts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    path = f"/v1/admin/rebalance?dry_run={str(arguments.dry_run).lower()}"
    try:
        document = fetch_document(
            arguments.url, arguments.api_key, path, "moves", method="POST", timeout_s=_TIMEOUT_S
        )
    except Unreachable as error:
        print(f"expertmesh rebalance: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(document))
    else:
        show(document, arguments.dry_run, Console())
    return 0


def show(document: dict[str, Any], dry_run: bool, console: Console) -> None:
    """For people."""
    moves, before, after = document["moves"], document["imbalance_before"], document["imbalance_after"]
    if before is None:
        console.print("no expert was asked for of late: nothing to go by")
        return
    if not moves and not document["dropped"]:
        console.print(f"nothing is worth moving: the busiest has {before:.2f} of the mean load", highlight=False)
        return
    table = Table("layer", "expert", "to", "from", box=None, pad_edge=False)
    for move in moves[:_SHOWN_MAX]:
        table.add_row(str(move["layer"]), str(move["expert"]), move["to"], move["from"] or "(a further replica)")
    console.print(table)
    if len(moves) > _SHOWN_MAX:
        console.print(f"and {len(moves) - _SHOWN_MAX} more (--json shows all)", highlight=False)
    dropped = document["dropped"]
    console.print(
        f"{len(moves)} expert(s) loaded, {show_size(document['bytes'])}; {dropped} replica(s) dropped; "
        f"the busiest has {before:.2f} of the mean load, and would have {after:.2f}",
        highlight=False,
    )
    if dry_run:
        console.print("nothing was changed")
    else:
        epoch = document["epoch"]
        console.print(f"epoch {epoch['term']}.{epoch['number']} is being prepared", highlight=False)
