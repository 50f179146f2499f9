"""`expertmesh scale`: other sizes for the pools of a running cluster, which serves all the while."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from cluster.commands.sizes import show_size
from cluster.commands.status import Refused, Unreachable, add_gateway, fetch, fetch_document
from cluster.config import ConfigError

_LOOK_S = 0.5
_PATIENCE_S = 30.0  # with a gateway or controller that does not answer meanwhile: it may be starting anew


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "scale",
        help="change the pools of a running cluster",
        description="Wants so many workers in either pool. Requests go on: experts are loaded before they are\n"
        "used, and a worker leaves once nobody needs it.",
        epilog="Example:  expertmesh scale --attention 2 --experts 3 --wait",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--attention", type=int, metavar="N", help="attention workers (default: as many as now)")
    parser.add_argument("--experts", type=int, metavar="M", help="expert workers (default: as many as now)")
    add_door(parser)
    parser.set_defaults(run=run)


def add_door(parser: argparse.ArgumentParser) -> None:
    """What `scale` and `drain` have in common."""
    add_gateway(parser)
    parser.add_argument("--wait", action="store_true", help="until it is so, with progress on stderr")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="longest --wait (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="the pools at the end, for scripts")


def run(arguments: argparse.Namespace) -> int:
    sizes = {"attention": arguments.attention, "experts": arguments.experts}
    asked = {name: size for name, size in sizes.items() if size is not None}
    if not asked:
        raise ConfigError(
            "--attention, --experts: neither given; accepted: a number of workers for either, or both"
        )
    return resize(arguments, "/v1/admin/scale", asked)


def resize(arguments: argparse.Namespace, path: str, asked: dict[str, Any]) -> int:
    """Ask for it, and wait for it if that is wanted. Returns the exit code: 1 too when it is not so in time."""
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout: {arguments.timeout:g}; accepted: seconds above 0")
    try:
        pools = fetch_document(arguments.url, arguments.api_key, path, "pools", asked)["pools"]
        if arguments.wait:
            pools = _wait(arguments)
    except Refused as error:
        raise ConfigError(str(error)) from None
    except (Unreachable, NotScaled) as error:
        print(f"expertmesh {arguments.command}: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps({"pools": pools}))
    else:
        print("; ".join(f"{role}: {_told(pool)}" for role, pool in pools.items()))
    return 0


class NotScaled(Exception):
    """The pools are not as wanted, and why."""


def _wait(arguments: argparse.Namespace) -> dict[str, Any]:
    """Until every wanted worker serves and nobody is left to leave. Raises NotScaled or Unreachable."""
    deadline_s = time.monotonic() + arguments.timeout
    said = ""
    for document in _documents(arguments):
        pools: dict[str, Any] = document["pools"]
        if document["scaling_failed"]:
            raise NotScaled(document["scaling_failed"])
        if all(pool["ready"] == pool["wanted"] and not pool["leaving"] for pool in pools.values()):
            return pools
        progress = ", ".join(_progress(worker) for worker in document["workers"] if worker["state"] != "ready")
        if progress != said:
            said = progress
            print(said, file=sys.stderr)
        if time.monotonic() > deadline_s:
            raise NotScaled(f"not done after {arguments.timeout:g} s (--timeout): {progress}; it goes on")
        time.sleep(_LOOK_S)
    raise AssertionError("documents do not end")


def _documents(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Status documents. One that cannot be had is asked for again: a controller may be starting anew."""
    heard_s = time.monotonic()
    while True:
        try:
            document = fetch(arguments.url, arguments.api_key)
        except Unreachable:
            if time.monotonic() - heard_s > _PATIENCE_S:
                raise
            time.sleep(_LOOK_S)
            continue
        heard_s = time.monotonic()
        yield document


def _progress(worker: dict[str, Any]) -> str:
    loaded, total = worker["bytes_loaded"], worker["bytes_total"]
    size = f" {show_size(loaded)} of {show_size(total)}" if total > loaded else ""
    return f"{worker['id']} {worker['state']}{size}"


def _told(pool: dict[str, int]) -> str:
    leaving = f", {pool['leaving']} leaving" if pool["leaving"] else ""
    return f"{pool['ready']} of {pool['wanted']} ready{leaving}"
