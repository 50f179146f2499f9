"""What may be asked of a rebalancing over REST, and its document over gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmesh.v1 import admin_pb2, identity_pb2

from gateway.errors import invalid

_VALUES = {"true": True, "false": False}


def is_dry_run(query: Mapping[str, str]) -> bool:
    """Raises BadRequest."""
    for name in query:
        if name != "dry_run":
            raise invalid(name, query[name], "no such parameter; known: dry_run")
    given = query.get("dry_run", "false")
    if given not in _VALUES:
        raise invalid("dry_run", given, "true or false")
    return _VALUES[given]


def typed(document: Mapping[str, Any]) -> admin_pb2.RebalanceResponse:
    return admin_pb2.RebalanceResponse(
        epoch=identity_pb2.Epoch(**document["epoch"]) if document["epoch"] else None,
        moves=[_move(move) for move in document["moves"]],
        dropped=document["dropped"],
        bytes=document["bytes"],
        imbalance_before=document["imbalance_before"],
        imbalance_after=document["imbalance_after"],
    )


def _move(move: Mapping[str, Any]) -> admin_pb2.ExpertMove:
    message = admin_pb2.ExpertMove(layer=move["layer"], expert=move["expert"], to=move["to"])
    setattr(message, "from", move["from"] or "")
    return message
