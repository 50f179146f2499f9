"""`expertmesh.v1.PlacementTable` <-> Placement. Greetings of links: transport/wire.py.

Expert ids travel as layer * num_experts + expert, one per slot in slot order.
"""

from __future__ import annotations

from expertmesh.v1 import control_pb2, identity_pb2

from router.errors import PlacementError
from router.placement import EpochId, Member, PlacedWorker, Placement


def placement_to_pb(placement: Placement) -> control_pb2.PlacementTable:
    epoch = identity_pb2.Epoch(term=placement.epoch.term, number=placement.epoch.number)
    return control_pb2.PlacementTable(
        epoch=epoch,
        fingerprint=placement.fingerprint,
        num_layers=placement.num_layers,
        num_experts=placement.num_experts,
        workers=[
            control_pb2.PlacedWorker(
                worker=incarnation_to_pb(worker.member),
                address=worker.address,
                experts=[layer * placement.num_experts + expert for layer, expert in worker.experts],
            )
            for worker in placement.workers
        ],
    )


def placement_from_pb(table: control_pb2.PlacementTable) -> Placement:
    """Raises PlacementError if it contradicts itself; experts without a holder are allowed."""
    if not (table.num_layers and table.num_experts):
        raise PlacementError(f"placement: {table.num_layers} layers of {table.num_experts} experts")
    workers = tuple(
        PlacedWorker(
            member_from_pb(worker.worker),
            worker.address,
            tuple(divmod(slot, table.num_experts) for slot in worker.experts),
        )
        for worker in table.workers
    )
    epoch = EpochId(table.epoch.term, table.epoch.number)
    placement = Placement(epoch, table.fingerprint, table.num_layers, table.num_experts, workers)
    placement.validate(partial=True)
    return placement


def incarnation_to_pb(member: Member) -> identity_pb2.Incarnation:
    return identity_pb2.Incarnation(id=member.id, number=member.incarnation)


def member_from_pb(incarnation: identity_pb2.Incarnation) -> Member:
    return Member(incarnation.id, incarnation.number)
