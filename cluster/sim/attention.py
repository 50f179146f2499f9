"""A simulated attention worker: the real book, dispatcher and deliveries, driven as `attention_workers` does.

The compute thread is written here again (`service.py`, `worker.py` and `decode.py` wait where it yields); the
streams are in `attention_links`. Keys and values are token ids in the blocks that the book hands out.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from attention_workers.book import Book, OrderRefused
from attention_workers.kv_blocks import KvBlocks
from attention_workers.microbatch import ping_pong, split
from attention_workers.sequence import Sequence as Running
from attention_workers.sequence import Span
from attention_workers.step import Plan, StepResult, TokenDelta
from attention_workers.streams import AttemptsRefused, GatewayGone, Item, still_said
from cluster.events import Exit, OrderBody, Publish, Register, Role
from cluster.sim import settings
from cluster.sim.arithmetic import SHAPE, add, begin, gate, next_token
from cluster.sim.attention_links import Streams
from cluster.sim.exchange import Exchange
from cluster.sim.member_link import MemberLink
from cluster.sim.network import Network
from cluster.sim.process import Bell, Process, Wait, Work
from model.layer_types import FULL, SLIDING, LayerType
from router.config import Replies, RouterConfig
from router.dispatcher import Dispatcher, Pause, Pending
from router.errors import ExpertsUnavailable
from router.membership import Adopted, Health, HealthState, PeerLost
from router.placement import Member, Placement
from router.transport.base import Peer

Told: TypeAlias = Item | Placement
"""Of the inbox. A placement: it is prepared."""
Computing: TypeAlias = Generator[Wait, None, bool]

INBOX_MAX = 4096


class AttentionShell:
    def __init__(
        self, process: Process, network: Network, router: RouterConfig, replies: Replies, *,
        is_hybrid: bool, microbatches: int,
    ) -> None:  # fmt: skip
        self.process = process
        sliding = KvBlocks(settings.SLIDING_BLOCKS, settings.SLIDING_WINDOW) if is_hybrid else None
        self.book = Book(
            SHAPE.fingerprint, process.member.incarnation, KvBlocks(settings.BLOCKS), settings.BLOCK_TOKENS,
            settings.SEQUENCES_MAX, settings.MODEL_LEN_MAX, router.rows_max, sliding,
        )  # fmt: skip
        self.keys: dict[LayerType, list[int]] = {  # by block and place in it: the token it stands for
            kind: [-1] * space.total * settings.BLOCK_TOKENS for kind, space in self.book.spaces.items()
        }
        self.exchange = Exchange(process, network, router)
        self.dispatcher = Dispatcher(self.exchange, process.member, router, self._peer_lost, replies=replies)
        self.has_placement = False
        self.has_changed = False  # book or placement, since they were last checked
        self.steps = self.tokens = 0
        self.missing_since_s: float | None = None  # experts, as far as the last step found
        self._microbatches = microbatches
        self._connect_s = router.connect_timeout_s
        self._inbox: list[Told] = []
        self._has_items, self._has_placement = Bell(), Bell()
        self._next: Placement | None = None  # to be prepared
        self.streams = Streams(process, network, self.book, self.tell)
        self.member_link = MemberLink(process, network, self._register, self._health, self._obey)
        self.member_link.start()
        process.spawn(self._prepare())
        process.spawn(self._serve())

    def _register(self) -> Register:
        epoch = self.dispatcher.epoch if self.has_placement else None
        return Register(Role.ATTENTION, self.process.pid, self.process.node, "cpu", "", epoch)

    def _health(self) -> Health:
        state = HealthState.READY if self.has_placement else HealthState.LOADING
        if self.has_placement and self.streams.is_draining:
            state = HealthState.DRAINING
        return Health(state, gauges={"sequences_open": self.streams.num_open})

    def _obey(self, order: OrderBody) -> None:
        match order:
            case Publish(placement):
                self._next = placement
                self._has_placement.ring()
            case Exit(reason):
                self.process.after(0.05, lambda: self.process.end(f"told to exit: {reason}"))

    def _peer_lost(self, member: Member) -> None:
        self.member_link.report(PeerLost(member))

    def tell(self, item: Told) -> None:
        assert len(self._inbox) < INBOX_MAX, f"{self.process}: {INBOX_MAX} messages unread"
        self._inbox.append(item)
        self._has_items.ring()

    # The preparing thread.

    def _prepare(self) -> Work:
        while True:
            if self._next is None:
                yield self._has_placement, 60.0
                continue
            placement, self._next = self._next, None
            peers = [Peer(w.member, w.address) for w in placement.workers if w.member not in self.dispatcher.lost]
            self.exchange.shake(peers)
            end_s = self.process.now_s() + self._connect_s
            while self.exchange.is_shaking() and (left_s := end_s - self.process.now_s()) > 1e-6:
                yield None, min(left_s, self._connect_s / 16)
            self.dispatcher.prepare(placement)
            self.tell(placement)

    # The compute thread.

    def _serve(self) -> Work:
        yield None, self.process.world.between(*settings.START_S)  # its weights
        is_busy = False
        while True:
            result = StepResult()
            is_waiting = self.missing_since_s is not None and self.book.sequences
            wait_s = settings.RETRY_S if is_waiting else 0.0 if is_busy else settings.IDLE_WAIT_S
            if wait_s and not self._inbox:
                yield self._has_items, wait_s
            if self._drain_inbox(result):
                self._hand_over(result, has_orders=True)
                result = StepResult()
            is_busy = False
            if self.has_placement:
                is_busy = yield from self._step(result)
            self._hand_over(result, has_orders=False)

    def _hand_over(self, result: StepResult, *, has_orders: bool) -> None:
        self.streams.hand_over(result, has_orders, self.steps, self.tokens, self.missing_since_s is not None)

    def _drain_inbox(self, result: StepResult) -> bool:
        """Whether there were orders."""
        has_orders = False
        self.has_changed = True
        told, self._inbox = still_said(self._inbox), []
        for item in told:
            match item:
                case Plan() as plan:
                    has_orders = True
                    self._apply(plan, result)
                case Placement():
                    epoch = self.dispatcher.adopt()
                    if epoch is not None:
                        self.has_placement = True
                        self.member_link.report(Adopted(epoch))
                        self.streams.open()
                case GatewayGone(address, undelivered):
                    gone = [*self.book.drop(address, result), *undelivered]
                    result.completions = [c for c in result.completions if c.attempt not in gone]
                    result.undelivered += gone
                case AttemptsRefused(attempts):
                    self.book.stop(attempts, result)
        return has_orders

    def _apply(self, plan: Plan, result: StepResult) -> None:
        try:
            self.book.apply(plan, result)
        except OrderRefused:
            return
        self.streams.obeyed.append(plan.term)

    def _step(self, result: StepResult) -> Computing:
        """One step; False when there was nothing to compute, or an expert has no live holder."""
        try:
            has_computed = yield from self._compute(result)
        except ExpertsUnavailable:
            now_s = self.process.now_s()
            self.missing_since_s = now_s if self.missing_since_s is None else self.missing_since_s
            if now_s - self.missing_since_s > settings.EXPERTS_WAIT_S:
                self.book.give_back(result)
            return False
        if self.missing_since_s is not None:
            if self.dispatcher.placement.is_covered_without(self.dispatcher.lost):
                self.missing_since_s = None
            elif has_computed:  # this step needed none of the missing: the wait begins anew
                self.missing_since_s = self.process.now_s()
        return has_computed

    def _compute(self, result: StepResult) -> Computing:
        began_s = self.process.now_s()
        spans = self.book.compose(result)
        self.has_changed = True
        if not spans:
            return False
        parts = split(spans, self._microbatches)
        hidden = [begin([t for s in part for t in self._tokens(s)]) for part in parts]
        pending: dict[int, Pending] = {}
        try:
            for work in ping_pong(SHAPE.num_layers, len(parts)):
                at = work.microbatch
                if work.op == "dispatch":
                    yield None, self._cost_s(len(hidden[at]))
                    routes = gate(work.layer, hidden[at])
                    pending[at] = self.dispatcher.dispatch(work.layer, hidden[at], routes)
                else:
                    mixed = yield from self._combine(pending.pop(at))
                    hidden[at] = add(hidden[at], mixed)
        finally:
            for left in pending.values():
                self.dispatcher.abandon(left)
        for span in spans:
            self._write(span)
        found = [self._next_tokens(part, rows) for part, rows in zip(parts, hidden, strict=True)]
        self.book.computed(spans, result)
        self.has_changed = True
        for sequence, token in [pair for pairs in found for pair in pairs]:
            delta = TokenDelta(sequence.start.attempt, sequence.num_generated, (token,))
            self.book.sampled(sequence, token, delta, result)
            self.tokens += 1
        self.steps += 1
        num_decodes = sum(span.is_decode for span in spans)
        num_rows = sum(span.count for span in spans) - num_decodes
        self.book.pace.observe(num_decodes, num_rows, self.process.now_s() - began_s)
        return True

    def _cost_s(self, rows: int) -> float:
        return (settings.ATTENTION_S + settings.ATTENTION_ROW_S * rows) * self.process.slow

    def _combine(self, pending: Pending) -> Generator[Wait, None, Tensor]:
        combining = self.dispatcher.combining(pending)
        try:
            wanted = next(combining)
            while True:
                if isinstance(wanted, Pause):
                    yield None, wanted.seconds
                    wanted = combining.send([])
                else:
                    outcomes = yield from self.exchange.outcomes(wanted)
                    wanted = combining.send(outcomes)
        except StopIteration as done:
            mixed: Tensor = done.value
            return mixed

    def _next_tokens(self, part: Sequence[Span], hidden: Tensor) -> list[tuple[Running, int]]:
        last = torch.tensor([s.count for s in part]).cumsum(0) - 1
        values = hidden[last, 0].to(torch.int64).tolist()
        return [
            (s.sequence, next_token(self._seen(s.sequence), s.sequence.start.sampling.seed, value))
            for s, value in zip(part, values, strict=True)
            if s.samples
        ]

    # Keys and values.

    def _tokens(self, span: Span) -> list[int]:
        return span.sequence.tokens[span.first : span.first + span.count]

    def _write(self, span: Span) -> None:
        size = settings.BLOCK_TOKENS
        for kind, table in span.sequence.tables.items():
            for position, token in enumerate(self._tokens(span), span.first):
                self.keys[kind][table.blocks[position // size - table.first] * size + position % size] = token

    def _seen(self, sequence: Running) -> list[int]:
        """What the blocks hold of a sequence; where the sliding ones hold something else, with a mark."""
        found = self._read(sequence, FULL, 0)
        space = self.book.spaces.get(SLIDING)
        if space is not None:
            first = space.first_seen(len(sequence.tokens) - 1)
            if self._read(sequence, SLIDING, first) != found[first:]:
                found.append(0)
        return found

    def _read(self, sequence: Running, kind: LayerType, first: int) -> list[int]:
        size, table = settings.BLOCK_TOKENS, sequence.tables[kind]
        return [
            self.keys[kind][table.blocks[position // size - table.first] * size + position % size]
            for position in range(first, len(sequence.tokens))
        ]
