"""`expertmesh status`: what a running cluster says of itself, over its REST port."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.commands.sizes import show_size

API_KEY_VARIABLE = "EXPERTMESH_API_KEY"
ADMIN_KEY_VARIABLE = "EXPERTMESH_ADMIN_KEY"
CLIENT_CERT_VARIABLE = "EXPERTMESH_CLIENT_CERT"
_TIMEOUT_S = 10.0


class Unreachable(Exception):
    """Names the URL and what is wrong with it."""


class Refused(Unreachable):
    """The cluster's own reason for not doing what was asked: names the field, the value and what is accepted."""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "status",
        help="show a running cluster",
        description="Shows phase, placement epoch and every worker of a running cluster.",
        epilog="Example:  expertmesh status --json | python -m json.tool",
    )
    add_gateway(parser)
    parser.add_argument("--json", action="store_true", help="the whole document, for scripts")
    parser.set_defaults(run=run)


def add_gateway(parser: argparse.ArgumentParser) -> None:
    """Which cluster is meant, and what opens its admin doors."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000",
        help="of its gateway (default: %(default)s); for https $SSL_CERT_FILE says whom to trust, and "
        f"${CLIENT_CERT_VARIABLE} has our own certificate and key",
    )  # fmt: skip
    key = os.environ.get(ADMIN_KEY_VARIABLE) or os.environ.get(API_KEY_VARIABLE)
    default = f"default: ${ADMIN_KEY_VARIABLE}, else ${API_KEY_VARIABLE}"
    parser.add_argument("--api-key", default=key, help=f"if it asks for one ({default})")


def run(arguments: argparse.Namespace) -> int:
    try:
        document = fetch(arguments.url, arguments.api_key)
    except Unreachable as error:
        print(f"expertmesh status: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(document))
    else:
        show(document, Console())
    return 0


def fetch(url: str, api_key: str | None) -> dict[str, Any]:
    """The status document. Raises Unreachable."""
    return fetch_document(url, api_key, "/v1/admin/status", "workers")


def fetch_document(
    url: str,
    api_key: str | None,
    path: str,
    key: str,
    body: dict[str, Any] | None = None,
    method: str | None = None,
    timeout_s: float = _TIMEOUT_S,
) -> dict[str, Any]:
    """What the gateway at `url` has at `path`, or answers to `body`: a JSON object that has `key`. `method`: GET,
    or POST with a body, if not told otherwise.

    Raises Refused or Unreachable."""
    if not url.startswith(("http://", "https://")):
        raise Unreachable(f"--url: {url!r}; accepted: http://host:port or https://host:port")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    sent = None if body is None else json.dumps(body).encode()
    if sent is not None:
        headers["Content-Type"] = "application/json"
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}{path}", sent, headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout_s, context=_tls(url)) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 400:
            raise Refused(_message(error)) from None
        raise Unreachable(f"{url} answers {error.code}: {_message(error)}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from None
    if not isinstance(document, dict) or key not in document:
        raise Unreachable(f"{url} is not an ExpertMesh gateway")
    return document


def _tls(url: str) -> ssl.SSLContext | None:
    """Who is trusted is OpenSSL's business, its $SSL_CERT_FILE included. Raises OSError, naming the file."""
    if not url.startswith("https://"):
        return None
    context = ssl.create_default_context()
    if own := os.environ.get(CLIENT_CERT_VARIABLE):
        try:
            context.load_cert_chain(own)
        except OSError as error:
            told = f"{CLIENT_CERT_VARIABLE}: {own!r}: {error}; accepted: certificate and key, PEM"
            raise OSError(told) from error
    return context


def _message(error: urllib.error.HTTPError) -> str:
    """Ours is in OpenAI's form; anyone may answer at a wrong port."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def show(document: dict[str, Any], console: Console) -> None:
    """For people."""
    console.print(_headline(document))
    columns = ("worker", "state", "pid", "life", "device", "weights", "slots", "detail")
    table = Table(*columns, box=None, pad_edge=False)
    for worker in document["workers"]:
        loaded = show_size(worker["bytes_loaded"])
        if worker["bytes_total"] > worker["bytes_loaded"]:
            loaded += f" of {show_size(worker['bytes_total'])}"
        elif worker["kept_as"]:
            loaded = f"{show_size(worker['bytes_kept'])} {worker['kept_as']}"
        table.add_row(
            worker["id"], Text(worker["state"], style=_STYLES.get(worker["state"], "")), _cell(worker["pid"]),
            str(worker["incarnation"]), _cell(worker["device"]), loaded, _cell(worker["slots"] or None),
            Text(worker["detail"]),
        )  # fmt: skip
    console.print(table)
    if document["scaling_failed"]:
        console.print(Text(f"not scaled: {document['scaling_failed']}", style="red"))
    for worker in document["workers"]:
        if "kv_blocks_total" in worker["gauges"]:
            console.print(f"{worker['id']}: keys and values {_kv(worker['gauges'])}", highlight=False)
            console.print(f"{worker['id']}: {_kv_memory(worker['gauges'])}", highlight=False)
        if links := worker.get("links"):
            told = ", ".join(f"{peer} {kind}" for peer, kind in sorted(links.items()))
            console.print(f"{worker['id']}: links {told}", highlight=False)
        if worker["gauges"].get("microbatches"):
            console.print(f"{worker['id']}: {_waits(worker['gauges'])}", highlight=False)
    if (imbalance := document["balance"]["imbalance"]) is not None:
        console.print(f"experts: {_balance(document['balance'], imbalance)}", highlight=False)
    gauges = (document["scheduler"] or {}).get("gauges", {})
    told = ", ".join(f"{gauges[name]:g} {name}" for name in ("running", "waiting") if name in gauges)
    console.print(f"scheduler: {told or 'not there'}")
    for gateway in document["gateways"]:
        console.print(f"{gateway['id']}: {gateway['address']} {gateway['state']}", highlight=False)
    for failure in document["failures"][-5:]:
        who = f"{failure['id']}#{failure['incarnation']}"
        console.print(Text(f"{failure['ago_s']:.0f} s ago {who}: {failure['reason']}", style="yellow"))


_STYLES = {
    "ready": "green", "failed": "red", "loading": "cyan", "starting": "cyan", "waiting": "yellow",
    "draining": "yellow", "leaving": "yellow",
}  # fmt: skip


def _kv(gauges: dict[str, float]) -> str:
    """Each block space as free of total blocks and the size of one."""
    spaces = {"": "", "sliding_": "in windows "} if "kv_sliding_blocks_total" in gauges else {"": ""}
    return ", ".join(
        f"{words}{gauges[f'kv_{space}blocks_free']:g} of {gauges[f'kv_{space}blocks_total']:g} blocks free, "
        f"{gauges[f'kv_{space}blocks_cached']:g} cached, "
        f"{show_size(gauges[f'kv_{space}block_bytes'])} each"
        for space, words in spaces.items()
    )


def _kv_memory(gauges: dict[str, float]) -> str:
    """How the spaces came to their sizes, and what they hold."""
    spaces = {"": "", "sliding_": " in windows"} if "kv_sliding_blocks_total" in gauges else {"": ""}
    blocks = " + ".join(
        f"{gauges[f'kv_{space}blocks_total']:g}{words} x {show_size(gauges[f'kv_{space}block_bytes'])}"
        for space, words in spaces.items()
    )
    return (
        f"of {show_size(gauges['kv_free_bytes'])} free {100 * gauges['kv_share']:.1f} % taken, "
        f"{show_size(gauges['kv_bytes'])} = {blocks}: {gauges['kv_tokens']:,.0f} tokens fit, "
        f"{gauges['kv_model_len_sequences']:g} sequences of {gauges['kv_model_len']:,.0f}"
    )


def _waits(gauges: dict[str, float]) -> str:
    """Of recent steps; `expertmesh trace` says more."""
    return (
        f"steps wait for experts {100 * gauges['exposed_wait_share']:.0f} % of their time (exchange "
        f"{100 * gauges['exchange_share']:.0f} %), {gauges['microbatches']:g} microbatch(es) in the last one"
    )


def _balance(balance: dict[str, Any], imbalance: float) -> str:
    """Of late, since the placement last changed."""
    total = sum(balance["loads"].values())
    shares = ", ".join(f"{worker} {load / total:.0%}" for worker, load in balance["loads"].items())
    preparing = balance["preparing"]
    then = f"; epoch {preparing['term']}.{preparing['number']} is being prepared" if preparing else ""
    return f"the busiest has {imbalance:.2f} of the mean load ({shares}){then}"


def _headline(document: dict[str, Any]) -> Text:
    epoch = document["epoch"]
    at = f"epoch {epoch['term']}.{epoch['number']}" if epoch else "no placement yet"
    model, phase = document["model"], document["phase"]
    return Text(f"{model}: {phase}, {at}, transport {document['transport']}, up {document['uptime_s']:.0f} s")


def _cell(value: object) -> str:
    return "" if value is None else str(value)
