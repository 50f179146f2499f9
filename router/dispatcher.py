"""Rows and routes out, the experts' sum back: plan, transport, merge, and failover between them.

A loss is a routing change: the rows of a lost or refusing worker are planned again on other replicas, at the
same layer of the same step, and the sum has the same bits whoever computed it. A worker once lost stays lost
until an epoch omits that incarnation. When nobody holds an expert, ExpertsUnavailable: how long to wait for a
better placement is the caller's decision, not made here. One thread at a time; another may `prepare`.

What is decided between two waits is one generator (`combining`), which says what to wait for and is told
what came: `combine` waits in this thread, the simulator in virtual time.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.gate import Routes
from router.config import Replies, RouterConfig, RowsSent
from router.errors import ExpertsUnavailable, ParcelMalformed, PlacementError
from router.merge import add, empty_ranks, empty_sums, merge, place
from router.placement import EpochId, Member, Placement
from router.plan import DispatchPlan, plan
from router.rows import pack
from router.transport.base import (
    AttentionEnd,
    Parcel,
    Peer,
    Prepared,
    Refusal,
    RefusalReason,
    Reply,
    Spent,
    Ticket,
)

_LOSSES = frozenset({RefusalReason.PEER_LOST, RefusalReason.DEADLINE})
_REFUSALS = frozenset({
    RefusalReason.STALE_EPOCH, RefusalReason.NOT_RESIDENT, RefusalReason.WRONG_INCARNATION,
    RefusalReason.OVERLOADED,
})  # fmt: skip
_Failure = tuple[Parcel, Tensor, Refusal]  # with the positions of its routes


class Heard(NamedTuple):
    """One reply, for the step trace. Times by `time.perf_counter_ns`; of the peer's, spans alone are known."""

    peer: Member
    sent_ns: int
    heard_ns: int  # when it was found: not before its ticket was waited for
    spent: Spent


@dataclass(frozen=True)
class Pause:
    """To wait before going on."""

    seconds: float


Combining = Generator[Ticket | Pause, list[Reply | Refusal], Tensor]
"""Yields a ticket, to be sent its outcomes, or a pause; returns the sum."""


@dataclass(frozen=True)
class Pending:
    """One dispatch, until combined or abandoned. It keeps what planning again needs."""

    layer: int
    rows: Tensor  # [T, H]
    routes: Routes
    plan: DispatchPlan
    ticket: Ticket | None  # None: there were no routes
    avoided: frozenset[Member]  # who refused these rows, though alive
    sent_ns: int  # by `time.perf_counter_ns`


class Dispatcher:
    def __init__(
        self,
        end: AttentionEnd,
        sender: Member,
        config: RouterConfig,
        on_lost: Callable[[Member], None],
        rows: RowsSent = "plain",
        replies: Replies = "rows",
    ) -> None:
        """`on_lost` is called for each expert worker found lost, within any method below: once, and again whenever
        a placement is adopted that still has it, for who was told may have gone and told nobody.
        `rows`, `replies`: as the end's links carry them."""
        self._end = end
        self._sender = sender
        self._config = config
        self._on_lost = on_lost
        self._rows, self._replies = rows, replies
        self._placement: Placement | None = None
        self._lost: frozenset[Member] = frozenset()
        self._newest: EpochId | None = None  # prepared
        self._prepared: tuple[Placement, Prepared] | None = None
        self._adopting = threading.Lock()  # of the field above, and of what the end knows of its peers
        self._tickets = 0
        self.waits = 0  # for replies, ended one way or the other; grows while a step does
        self.waited_ns = 0  # for replies, in the last combine
        self.heard: list[Heard] = []  # its replies
        self._counts: Counter[str] = Counter()

    @property
    def placement(self) -> Placement:
        if self._placement is None:
            raise PlacementError("placement: none adopted yet")
        return self._placement

    @property
    def device(self) -> torch.device:
        """Where rows lie that links carry, and their sum."""
        return self._end.device

    @property
    def rows_max(self) -> int:
        """Most rows of one dispatch."""
        return self._config.rows_max

    @property
    def epoch(self) -> EpochId:
        return self.placement.epoch

    @property
    def lost(self) -> frozenset[Member]:
        """Members of the placement in use that take no more parcels."""
        return self._lost

    def counters(self) -> dict[str, int]:
        """Ever growing: parcels, rows, routes, replans, lost, refused_<reason>."""
        return dict(self._counts)

    def prepare(self, placement: Placement) -> None:
        """Shake hands with its new workers, in another thread than the dispatcher's: one, always the same.

        Returns once every link is up or has failed, at most `connect_timeout_s` later; `adopt` then uses it. A
        placement that was prepared and not adopted yet is overtaken: its links are closed. Raises
        PlacementError if it is older than the newest prepared.
        """
        if self._newest is not None and placement.epoch < self._newest:
            raise PlacementError(f"epoch: {placement.epoch}; must be at least {self._newest}")
        self._newest = placement.epoch
        self._drop_prepared()
        peers = [
            Peer(worker.member, worker.address) for worker in placement.workers if worker.member not in self._lost
        ]
        links = self._end.prepare(peers, self._config.connect_timeout_s)
        with self._adopting:
            self._prepared = placement, links

    def adopt(self) -> EpochId | None:
        """Use from now on what was prepared. Between steps only: nothing may be pending. Does not wait.

        Returns its epoch; None if nothing (new) was prepared.
        """
        with self._adopting:
            if self._prepared is None:
                return None
            (placement, links), self._prepared = self._prepared, None
            failed = self._end.adopt(links)
        self._lost &= {worker.member for worker in placement.workers}
        self._placement = placement
        for member in sorted(self._lost):
            self._on_lost(member)
        self._lose(failed)
        return placement.epoch

    def dispatch(self, layer: int, rows: Tensor, routes: Routes) -> Pending:
        """rows [T, H] of the link's dtype, on `device`, unchanged until combined; routes: expert ids on the host.
        Does not wait.

        Raises ExpertsUnavailable, with nothing sent.
        """
        if len(rows) > self._config.rows_max:
            raise ValueError(f"rows: {len(rows)}; at most {self._config.rows_max} (rows_max)")
        self._lose(self._end.lost())
        planned = plan(routes, self.placement, layer, self._lost)
        return self._send(layer, rows, routes, planned, frozenset())

    def combine(self, pending: Pending) -> Tensor:
        """[T, H] float32: the weighted sum of the experts' rows. Once for each pending.

        Waits for at most 1 + `replans_max` plans, for each until everybody has answered or was silent for
        `combine_timeout_s`, `combine_total_s` at most. Raises
        ExpertsUnavailable or ParcelMalformed; then nothing of the pending is in flight.
        """
        combining, outcomes = self.combining(pending), list[Reply | Refusal]()
        try:
            wanted = next(combining)
            while True:
                if isinstance(wanted, Pause):
                    time.sleep(wanted.seconds)
                else:
                    outcomes = self._end.combine(wanted, self._config.combine_timeout_s)
                wanted = combining.send(outcomes)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    def combining(self, pending: Pending) -> Combining:
        """What `combine` does, waiting left to the caller: each outcome once, at the end of its ticket."""
        self.waited_ns, self.heard = 0, []
        weights = pending.routes.weights.to(pending.rows.device)  # [T, K]
        num_tokens, num_ranks = weights.shape
        hidden, device = pending.rows.shape[1], pending.rows.device
        sums = self._replies == "sums"
        into = (
            empty_sums(num_tokens, hidden, device) if sums else empty_ranks(num_tokens, num_ranks, hidden, device)
        )
        for attempt in range(self._config.replans_max + 1):
            failed = yield from self._gather(pending, into)
            if not failed:
                return into if sums else merge(into, weights)
            if attempt < self._config.replans_max:
                pending = yield from self._send_again(pending, failed, attempt)
        experts = frozenset(torch.cat([parcel.route_experts for parcel, _, _ in failed]).tolist())
        refusal = failed[0][2]
        raise ExpertsUnavailable(pending.layer, experts, f"{refusal.reason.name}, {refusal.detail}, after "
                                 f"{self._config.replans_max} replans (replans_max)")  # fmt: skip

    def abandon(self, pending: Pending) -> None:
        """Let go of a dispatch that will not be combined. Idempotent."""
        if pending.ticket is not None:
            self._end.release(pending.ticket)

    def transports(self) -> dict[Member, str]:
        """Who is linked, and by which transport. From any thread."""
        return self._end.transports()

    def close(self) -> None:
        """Idempotent. Nobody may be preparing."""
        self._drop_prepared()
        self._end.close()

    def _drop_prepared(self) -> None:
        with self._adopting:
            prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared[1].close()

    def _send(
        self, layer: int, rows: Tensor, routes: Routes, planned: DispatchPlan, avoided: frozenset[Member]
    ) -> Pending:
        if planned.missing:
            raise ExpertsUnavailable(layer, planned.missing, "no live worker holds them")
        parcels = []
        self._tickets += 1
        sent = rows if self._rows == "plain" else pack(rows)
        weights = routes.weights.cpu().t().reshape(-1) if self._replies == "sums" else None  # [K * T]
        for parcel in planned.parcels:
            every = len(parcel.tokens) == len(rows)
            parcels.append(
                Parcel(
                    sender=self._sender,
                    to=self.placement.workers[parcel.worker].member,
                    epoch=self.epoch,
                    ticket=self._tickets,
                    layer=layer,
                    rows=sent if every else sent.index_select(0, parcel.tokens.to(rows.device)),
                    route_rows=parcel.route_rows,
                    route_experts=parcel.route_experts,
                    route_weights=None if weights is None else weights[parcel.positions],
                )
            )
            self._counts["rows"] += len(parcel.tokens)
            self._counts["routes"] += len(parcel.positions)
        self._counts["parcels"] += len(parcels)
        sent_ns = time.perf_counter_ns()
        ticket = self._end.dispatch(parcels) if parcels else None
        return Pending(layer, rows, routes, planned, ticket, avoided, sent_ns)

    def _gather(
        self, pending: Pending, into: Tensor
    ) -> Generator[Ticket | Pause, list[Reply | Refusal], list[_Failure]]:
        """Place the replies of one ticket, release it, and say what must be planned again."""
        if pending.ticket is None:
            return []
        failed: list[_Failure] = []
        began_ns = time.perf_counter_ns()
        outcomes = yield pending.ticket
        self.waited_ns += time.perf_counter_ns() - began_ns
        self.waits += 1
        for parcel, planned, outcome in zip(pending.ticket.parcels, pending.plan.parcels, outcomes, strict=True):
            if isinstance(outcome, Reply):
                if self._replies == "sums":
                    add(into, planned.tokens, outcome.rows)
                else:
                    place(into, planned.positions, outcome.rows)
                self.heard.append(Heard(parcel.to, pending.sent_ns, outcome.heard_ns, outcome.spent))
            else:
                self._counts[f"refused_{outcome.reason.name.lower()}"] += 1
                failed.append((parcel, planned.positions, outcome))
        self._end.release(pending.ticket)
        self._lose(parcel.to for parcel, _, refusal in failed if refusal.reason in _LOSSES)
        for parcel, _, refusal in failed:
            if refusal.reason is RefusalReason.MALFORMED:
                raise ParcelMalformed(f"layer {pending.layer}: {parcel.to} says: {refusal.detail}")
        return failed

    def _send_again(
        self, pending: Pending, failed: list[_Failure], attempt: int
    ) -> Generator[Ticket | Pause, list[Reply | Refusal], Pending]:
        """Plan the failed routes on workers that neither are lost nor refused them, where there are any."""
        avoided = pending.avoided.union(parcel.to for parcel, _, refusal in failed if refusal.reason in _REFUSALS)
        if any(refusal.reason is RefusalReason.OVERLOADED for _, _, refusal in failed):
            yield Pause(self._config.overload_pause_s * 2**attempt)
        self._counts["replans"] += 1
        positions = torch.cat([positions for _, positions, _ in failed])
        planned = self._replan(pending, positions, avoided)
        return self._send(pending.layer, pending.rows, pending.routes, planned, avoided)

    def _replan(self, pending: Pending, positions: Tensor, avoided: frozenset[Member]) -> DispatchPlan:
        routes, layer = pending.routes, pending.layer
        planned = plan(routes, self.placement, layer, self._lost | avoided, positions)
        if not (planned.missing and avoided):
            return planned
        # A parcel is refused as a whole, though one of its experts may be why: those that only a worker who
        # refused could compute are offered to it again, without the others.
        experts = routes.expert_ids.t().reshape(-1)[positions]
        only_there = positions[torch.isin(experts, torch.tensor(sorted(planned.missing)))]
        rest = plan(routes, self.placement, layer, self._lost, only_there)
        return DispatchPlan(planned.parcels + rest.parcels, rest.missing)

    def _lose(self, members: Iterable[Member]) -> None:
        for member in sorted(members):  # sets have no order that two runs share
            if member not in self._lost:
                self._lost |= {member}
                self._counts["lost"] += 1
                self._on_lost(member)
