"""Between the controller's events and orders and the messages of `expertmesh.v1`. What cannot be is Malformed.

The placement table has its codec in `router/wire.py`.
"""

from __future__ import annotations

import json
from typing import Any

from expertmesh.v1 import control_pb2, identity_pb2

from cluster.events import (
    Drain,
    Exit,
    Members,
    Order,
    OrderBody,
    Prepare,
    Publish,
    Register,
    Report,
    ReportBody,
    Resize,
    Retire,
    Role,
    SendTrace,
)
from cluster.scaling import Refused
from router.errors import PlacementError
from router.membership import Adopted, ExpertLoad, Health, HealthState, PeerLost, Prepared, Traced, Unprepared
from router.placement import EpochId, Member, Placement
from router.wire import incarnation_to_pb, member_from_pb, placement_from_pb, placement_to_pb

_ROLES = {
    Role.ATTENTION: identity_pb2.ROLE_ATTENTION,
    Role.EXPERT: identity_pb2.ROLE_EXPERT,
    Role.SCHEDULER: identity_pb2.ROLE_SCHEDULER,
    Role.GATEWAY: identity_pb2.ROLE_GATEWAY,
}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}

_STATES = {
    HealthState.STARTING: control_pb2.MEMBER_STATE_STARTING,
    HealthState.LOADING: control_pb2.MEMBER_STATE_LOADING,
    HealthState.READY: control_pb2.MEMBER_STATE_READY,
    HealthState.DRAINING: control_pb2.MEMBER_STATE_DRAINING,
    HealthState.FAILED: control_pb2.MEMBER_STATE_FAILED,
}
_STATES_BACK = {number: state for state, number in _STATES.items()}


class Malformed(Exception):
    """A message that no peer of ours sends: names the field, the value and what is accepted."""


def encode_report(report: Report) -> control_pb2.MemberReport:
    message = control_pb2.MemberReport(
        sender=incarnation_to_pb(report.sender), fingerprint=report.fingerprint, term=report.term
    )
    match report.body:
        case Register() as body:
            message.register.CopyFrom(_register(body))
        case Health() as body:
            message.heartbeat.CopyFrom(_heartbeat(body))
        case Prepared(epoch):
            message.prepared.epoch.CopyFrom(_epoch(epoch))
        case Unprepared(epoch, why):
            message.unprepared.CopyFrom(control_pb2.Unprepared(epoch=_epoch(epoch), why=why))
        case Adopted(epoch):
            message.adopted.epoch.CopyFrom(_epoch(epoch))
        case PeerLost(member):
            message.peer_lost.CopyFrom(incarnation_to_pb(member))
        case Traced(number, trace):
            message.trace.CopyFrom(control_pb2.TraceReport(number=number, trace=trace))
    return message


def decode_report(message: control_pb2.MemberReport) -> Report:
    return Report(_member(message.sender), message.fingerprint, message.term, _report_body(message))


def _report_body(message: control_pb2.MemberReport) -> ReportBody:
    match message.WhichOneof("body"):
        case "register":
            return _decode_register(message.register)
        case "heartbeat":
            return _decode_heartbeat(message.heartbeat)
        case "prepared":
            return Prepared(_epoch_id(message.prepared.epoch))
        case "unprepared":
            return Unprepared(_epoch_id(message.unprepared.epoch), message.unprepared.why)
        case "adopted":
            return Adopted(_epoch_id(message.adopted.epoch))
        case "peer_lost":
            return PeerLost(_member(message.peer_lost))
        case "trace":
            return Traced(message.trace.number, message.trace.trace)
        case other:
            accepted = "register, heartbeat, prepared, unprepared, adopted, peer_lost, trace"
            raise Malformed(f"report: body {other}; accepted: {accepted}")


def encode_order(order: Order) -> control_pb2.MemberOrder:
    message = control_pb2.MemberOrder(term=order.term, fingerprint=order.fingerprint)
    match order.body:
        case Prepare(placement, unhurried):
            message.prepare.CopyFrom(placement_to_pb(placement))
            message.unhurried = unhurried
        case Publish(placement):
            message.publish.CopyFrom(placement_to_pb(placement))
        case Retire(epoch):
            message.retire.epoch.CopyFrom(_epoch(epoch))
        case Members() as body:
            message.members.CopyFrom(_members(body))
        case Exit(reason):
            message.exit.reason = reason
            message.exit.SetInParent()
        case SendTrace(number, seconds, bytes_max):
            wanted = control_pb2.SendTrace(number=number, seconds=seconds, bytes_max=bytes_max)
            message.send_trace.CopyFrom(wanted)
    return message


def decode_order(message: control_pb2.MemberOrder) -> Order:
    return Order(message.term, message.fingerprint, _order_body(message))


def _order_body(message: control_pb2.MemberOrder) -> OrderBody:
    match message.WhichOneof("body"):
        case "prepare":
            return Prepare(_placement(message.prepare), message.unhurried)
        case "publish":
            return Publish(_placement(message.publish))
        case "retire":
            return Retire(_epoch_id(message.retire.epoch))
        case "members":
            return _decode_members(message.members)
        case "exit":
            return Exit(message.exit.reason)
        case "send_trace":
            wanted = message.send_trace
            return SendTrace(wanted.number, wanted.seconds, wanted.bytes_max)
        case other:
            raise Malformed(f"order: body {other}; accepted: prepare, publish, retire, members, exit, send_trace")


def encode_status(document: dict[str, Any]) -> control_pb2.StatusReply:
    return control_pb2.StatusReply(json=json.dumps(document))


def decode_status(reply: control_pb2.StatusReply) -> dict[str, Any]:
    document = json.loads(reply.json)
    if not isinstance(document, dict):
        raise Malformed(f"status: a {type(document).__name__}; accepted: an object")
    return document


def encode_rebalancing(document: dict[str, Any]) -> control_pb2.BalanceReply:
    return control_pb2.BalanceReply(json=json.dumps(document))


def decode_rebalancing(reply: control_pb2.BalanceReply) -> dict[str, Any]:
    document = json.loads(reply.json)
    if not isinstance(document, dict):
        raise Malformed(f"rebalancing: a {type(document).__name__}; accepted: an object")
    return document


def decode_resize(request: control_pb2.ResizeRequest) -> Resize | Drain:
    if request.drain:
        return Drain(request.drain)
    return Resize(
        request.attention if request.HasField("attention") else None,
        request.experts if request.HasField("experts") else None,
    )


def encode_refused(refused: Refused) -> control_pb2.ResizeReply:
    body = control_pb2.ResizeRefused(field=refused.field, value=refused.value, accepted=refused.accepted)
    return control_pb2.ResizeReply(refused=body)


def encode_placement(published: Placement | None) -> control_pb2.PlacementReply:
    return control_pb2.PlacementReply(table=None if published is None else placement_to_pb(published))


def _register(body: Register) -> control_pb2.Register:
    return control_pb2.Register(
        role=_ROLES[body.role], pid=body.pid, node=body.node, device=body.device, address=body.address,
        epoch=_epoch(body.epoch) if body.epoch else None,
    )  # fmt: skip


def _decode_register(body: control_pb2.Register) -> Register:
    if body.role not in _ROLES_BACK:
        raise Malformed(f"register: role {body.role}; accepted: {sorted(_ROLES_BACK)}")
    epoch = _epoch_id(body.epoch) if body.HasField("epoch") else None
    return Register(_ROLES_BACK[body.role], body.pid, body.node, body.device, body.address, epoch)


def _members(body: Members) -> control_pb2.Members:
    attention, draining = map(incarnation_to_pb, body.attention), map(incarnation_to_pb, body.draining)
    return control_pb2.Members(attention=attention, pid=body.pid, node=body.node, draining=draining)


def _decode_members(body: control_pb2.Members) -> Members:
    attention, draining = tuple(map(_member, body.attention)), tuple(map(_member, body.draining))
    if strangers := set(draining) - set(attention):
        raise Malformed(f"members: draining {sorted(strangers)}; accepted: some of attention")
    return Members(attention, body.pid, body.node, draining)


def _heartbeat(body: Health) -> control_pb2.Heartbeat:
    return control_pb2.Heartbeat(
        state=_STATES[HealthState(body.state)], bytes_loaded=body.bytes_loaded, bytes_total=body.bytes_total,
        detail=body.detail, gauges=dict(body.gauges), bytes_kept=body.bytes_kept, kept_as=body.kept_as,
        links=dict(body.links), load=_load(body.load),
    )  # fmt: skip


def _decode_heartbeat(body: control_pb2.Heartbeat) -> Health:
    if body.state not in _STATES_BACK:
        raise Malformed(f"heartbeat: state {body.state}; accepted: {sorted(_STATES_BACK)}")
    return Health(
        _STATES_BACK[body.state], body.bytes_loaded, body.bytes_total, body.detail, dict(body.gauges),
        body.bytes_kept, body.kept_as, dict(body.links), _decode_load(body.load),
    )  # fmt: skip


def _load(load: ExpertLoad) -> control_pb2.ExpertLoad | None:
    return control_pb2.ExpertLoad(slots=load.slots, reads=load.reads, rows=load.rows) if load.slots else None


def _decode_load(load: control_pb2.ExpertLoad) -> ExpertLoad:
    slots, reads, rows = tuple(load.slots), tuple(load.reads), tuple(load.rows)
    if not len(slots) == len(reads) == len(rows):
        raise Malformed(
            f"load: {len(slots)} slots, {len(reads)} reads, {len(rows)} rows; accepted: as many of each"
        )
    return ExpertLoad(slots, reads, rows)


def _member(incarnation: identity_pb2.Incarnation) -> Member:
    if not incarnation.id or not incarnation.number:
        raise Malformed(f"incarnation: {incarnation.id!r}#{incarnation.number}; accepted: a name, and 1 or more")
    return member_from_pb(incarnation)


def _placement(table: control_pb2.PlacementTable) -> Placement:
    try:
        return placement_from_pb(table)
    except PlacementError as error:
        raise Malformed(str(error)) from error


def _epoch(epoch: EpochId) -> identity_pb2.Epoch:
    return identity_pb2.Epoch(term=epoch.term, number=epoch.number)


def _epoch_id(epoch: identity_pb2.Epoch) -> EpochId:
    return EpochId(epoch.term, epoch.number)
