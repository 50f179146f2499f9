"""Rows in FP8 and replies that are sums: the same on every transport, and right when a worker is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.gate import Routes
from router.config import Replies, RowsSent
from router.dispatcher import Dispatcher
from router.placement import EpochId, Member, spread
from router.rows import sums, unpack
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Parcel, Refusal, RefusalReason, Reply
from router.transport.cuda import GPU_KINDS
from router.transport.local import LocalHub
from router.transport.select import attention_end, expert_end
from tests.contracts.exchange_parties import (
    CONFIG,
    DEVICE,
    PATIENCE_S,
    ExpertThread,
    connect,
    gpu_of,
    identity,
    parcel,
)

HIDDEN, EXPERTS, TOP_K, TOKENS = 200, 6, 4, 9
KINDS = (*(("local", "shm", "grpc") if DEVICE.type == "cpu" else ()), *GPU_KINDS)
ENCODINGS: list[tuple[RowsSent, Replies]] = [("plain", "sums"), ("fp8", "rows"), ("fp8", "sums")]


class Exchange:
    def __init__(self, kind: str, rows: RowsSent, replies: Replies) -> None:
        self._kind, self._hub = kind, LocalHub()
        self._config = replace(CONFIG, link_bytes_max=1 << 18)
        self._like = replace(identity(hidden=HIDDEN), rows=rows, replies=replies)

    def who(self, name: str) -> LinkIdentity:
        return replace(self._like, member=Member(name, 1))

    def attention(self, who: LinkIdentity) -> AttentionEnd:
        return attention_end(self._kind, who, self._config, self._hub, gpu=gpu_of(self._kind))

    def expert(self, who: LinkIdentity) -> ExpertEnd:
        return expert_end(self._kind, who, self._config, self._hub, gpu=gpu_of(self._kind))

    @contextlib.contextmanager
    def experts(self, count: int, deaf: str = "") -> Iterator[list[ExpertThread]]:
        with contextlib.ExitStack() as stack:
            threads = []
            for number in range(count):
                who = self.who(f"expert-{number}")
                behave = refuse if who.member.id == deaf else answer
                threads.append(stack.enter_context(ExpertThread(self.expert(who), who, behave)))
            yield threads

    def dispatcher(self, threads: list[ExpertThread], replicas: int) -> Dispatcher:
        who = self.who("attention-0")
        dispatcher = Dispatcher(
            self.attention(who), who.member, self._config, lambda _: None, who.rows, who.replies
        )  # fmt: skip
        members = [(thread.member, thread.end.address) for thread in threads]
        dispatcher.prepare(spread(EpochId(1, 1), who.fingerprint, members, 1, EXPERTS, replicas))
        dispatcher.adopt()
        return dispatcher


def expert_of(row: Tensor, expert: int) -> Tensor:
    return row * (expert + 1) - 0.5 * expert


def answer(end: ExpertEnd, parcel: Parcel) -> None:
    rows = parcel.rows if parcel.rows.shape[1] == HIDDEN else unpack(parcel.rows, HIDDEN)
    routes = zip(parcel.route_rows.tolist(), parcel.route_experts.tolist(), strict=True)
    out = torch.stack([expert_of(rows[row], expert) for row, expert in routes])
    if parcel.route_weights is not None:
        out = sums(out, parcel.route_weights, parcel.route_rows, len(rows))
    end.reply(parcel, out)


def refuse(end: ExpertEnd, parcel: Parcel) -> None:
    end.refuse(parcel, RefusalReason.NOT_RESIDENT, "deaf")


def some_step() -> tuple[Tensor, Routes]:
    chance = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(EXPERTS, generator=chance)[:TOP_K] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN, generator=chance), Routes(ids, torch.rand(TOKENS, TOP_K, generator=chance))


def direct(rows: Tensor, routes: Routes) -> Tensor:
    total = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for expert, weight in zip(routes.expert_ids[token].tolist(), routes.weights[token], strict=True):
            total[token] += weight * expert_of(rows[token], expert)
    return total


@pytest.mark.parametrize("deaf", ["", "expert-1"])
@pytest.mark.parametrize(("rows", "replies"), ENCODINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_the_same_however_it_travels(kind: str, rows: RowsSent, replies: Replies, deaf: str) -> None:
    """Sums to float32's rounding, FP8 to a sixteenth of each element; planned again where a worker refuses."""
    exchange = Exchange(kind, rows, replies)
    sent, routes = some_step()
    with exchange.experts(3, deaf) as threads:
        dispatcher = exchange.dispatcher(threads, replicas=2)
        try:
            got = dispatcher.combine(dispatcher.dispatch(0, sent.to(DEVICE), routes)).cpu()
        finally:
            dispatcher.close()
    expected = direct(sent, routes)
    if rows == "plain":
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    else:
        gain = (routes.weights * (routes.expert_ids + 1)).sum(1, keepdim=True)  # of an error in a row
        assert ((got - expected).abs() <= gain * (sent.abs() / 16 + 0.01)).all()
        assert not torch.allclose(got, expected, rtol=1e-5, atol=1e-5)  # it did travel in FP8


@pytest.mark.parametrize("kind", KINDS)
def test_ends_that_encode_differently_are_not_linked(kind: str) -> None:
    """Told apart by name, before any row is misread."""
    exchange = Exchange(kind, "fp8", "rows")
    with exchange.experts(1) as (thread,):
        for change, reason in (({"rows": "plain"}, "rows: plain; must be fp8"),
                               ({"replies": "sums"}, "replies: sums; must be rows")):  # fmt: skip
            end = exchange.attention(replace(exchange.who("attention-0"), **change))
            try:
                assert reason in connect(end, [thread.peer])[thread.member]
            finally:
                end.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_parcel_without_weights_is_not_sent_where_sums_are_due(kind: str) -> None:
    exchange = Exchange(kind, "plain", "sums")
    with exchange.experts(1) as (thread,):
        end = exchange.attention(who := exchange.who("attention-0"))
        try:
            assert not connect(end, [thread.peer])
            bare = parcel(who, thread.member, ticket=1)
            whole = replace(bare, ticket=2, route_weights=torch.ones(len(bare.route_rows)))
            (refusal,) = end.combine(end.dispatch([bare]), PATIENCE_S)
            (reply,) = end.combine(end.dispatch([whole]), PATIENCE_S)
            assert isinstance(refusal, Refusal)
            assert refusal.reason is RefusalReason.MALFORMED
            assert isinstance(reply, Reply)
            assert reply.rows.shape == bare.rows.shape
        finally:
            end.close()
