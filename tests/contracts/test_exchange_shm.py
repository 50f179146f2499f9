"""The shared-memory transport keeps the exchange contract, between processes and against bad peers too."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch

from router.config import PAGE_BYTES, RouterConfig
from router.transport.base import (
    AttentionEnd,
    ExpertEnd,
    LinkIdentity,
    Parcel,
    Peer,
    Refusal,
    RefusalReason,
    Reply,
)
from router.transport.select import attention_end, expert_end
from router.transport.shm_attention import ShmAttentionEnd
from router.transport.shm_expert import ShmExpertEnd
from router.transport.shm_handshake import greet, welcomed
from router.transport.shm_ring import RingMemory
from tests.contracts.exchange_link_suite import footprint
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, answer, computed, identity, parcel
from tests.contracts.exchange_process import attention_process, expert_process
from tests.contracts.exchange_suite import ExchangeSuite


class TestShmExchange(ExchangeSuite):
    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("shm", who, config)

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("shm", who, config)

    def test_a_full_ring_is_overloaded_and_recovers(self) -> None:
        """Bytes are bounded as parcels are: room for every reply is kept before its parcel is sent."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert, config=replace(CONFIG, link_bytes_max=PAGE_BYTES))
        tickets = [end.dispatch([parcel(me, expert.member, number, rows=8)]) for number in range(9)]
        outcomes = [end.combine(ticket, PATIENCE_S)[0] for ticket in tickets]
        sent = sum(isinstance(outcome, Reply) for outcome in outcomes)
        assert 1 <= sent < 9
        assert all(isinstance(outcome, Reply) for outcome in outcomes[:sent])
        for refused in outcomes[sent:]:
            assert isinstance(refused, Refusal)
            assert refused.reason is RefusalReason.OVERLOADED
        for ticket in tickets:
            end.release(ticket)
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member, 10, rows=8)]), PATIENCE_S)
        assert isinstance(outcome, Reply)

    def test_a_parcel_that_could_never_fit_is_malformed(self) -> None:
        """Waiting for room would be waiting for ever; the detail names the setting to raise."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert, config=replace(CONFIG, link_bytes_max=PAGE_BYTES))
        [outcome] = end.combine(
            end.dispatch([parcel(me, expert.member, rows=64, route_rows=[0] * 200)]), PATIENCE_S
        )
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.MALFORMED
        assert "link_bytes_max" in outcome.detail

    @pytest.mark.parametrize(
        "vandalise",
        [
            lambda parcels: parcels.head.__setitem__(0, 2**63),
            lambda parcels: publish(parcels, entry=1 << 33 | 2),
            lambda parcels: publish(parcels, entry=2**64 - 1),
            lambda parcels: publish(parcels, entry=2),
            lambda parcels: publish(parcels, entry=0),
            lambda parcels: publish(parcels, entry=2, words=b"garbage!" * 16),
        ],
    )
    def test_a_vandal_loses_its_link_and_nobody_else(self, vandalise: Callable[[RingMemory], None]) -> None:
        """Counters, entries and headers in shared memory are a stranger's words."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        wiring = greet(expert.peer, identity("attention-vandal"), CONFIG)
        wiring.sock.settimeout(PATIENCE_S)
        welcomed(wiring.sock, expert.peer)
        vandalise(wiring.segment.parcels)
        os.eventfd_write(wiring.parcels_bell, 1)
        assert wiring.sock.recv(1) == b""  # hung up on
        wiring.close()
        sent = parcel(me, expert.member)
        [reply] = end.combine(end.dispatch([sent]), PATIENCE_S)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.rows, computed(sent))

    def test_a_vandal_among_the_experts_is_a_lost_peer(self) -> None:
        """The attention worker goes on without it."""

        def scribble(_: ExpertEnd, received: Parcel) -> None:
            received.link.wiring.segment.replies.head[0] = 2**40  # type: ignore[attr-defined]
            os.eventfd_write(received.link.wiring.replies_bell, 1)  # type: ignore[attr-defined]

        expert = self.expert(scribble)
        me = identity()
        end = self.attention(me, expert)
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.PEER_LOST
        assert "head" in outcome.detail

    @pytest.mark.parametrize("words", [b"", b"\xff" * 64, b"x" * 5000])
    def test_a_stranger_with_a_bad_hello_is_turned_away(self, words: bytes) -> None:
        """Whatever comes in at the door, those inside are not disturbed."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(PATIENCE_S)
            stranger.connect("\0" + expert.end.address.removeprefix("unix-abstract:"))
            stranger.send(words)
            assert b"hello" in stranger.recv(4096)
            assert stranger.recv(1) == b""
        [reply] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert isinstance(reply, Reply)


def publish(parcels: RingMemory, entry: int, words: bytes = b"") -> None:
    """Whatever the rules say."""
    parcels.frames[: len(words)] = words
    parcels.entries[0] = entry
    parcels.head[0] = 1


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[tuple[BaseProcess, Connection]]:
    """A spawned process and our end of its pipe; it is killed at the latest when left."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=target, args=(theirs, *args))
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join(PATIENCE_S)
        child.close()
        ours.close()


def told(pipe: Connection) -> str:
    assert pipe.poll(3 * PATIENCE_S), "the process says nothing"
    return pipe.recv_bytes().decode()


@pytest.fixture
def addresses() -> Iterator[list[str]]:
    """Where ends listened; afterwards nothing is left: no descriptor, thread or mapping here, no such name."""
    resource_tracker.ensure_running()
    gc.collect()
    before = footprint()
    used: list[str] = []
    yield used
    gc.collect()
    assert footprint() == before
    assert used
    with open("/proc/net/unix") as sockets:
        names = sockets.read()
    assert not any(address.replace("unix-abstract:", "@") in names for address in used)


def test_an_expert_process_killed_mid_wait_is_noticed_at_once(addresses: list[str]) -> None:
    """kill -9 costs a replan, not the hang deadline."""
    me, expert = identity(), identity("expert-0").member
    with process(expert_process, True) as (child, pipe):
        addresses.append(told(pipe))
        end = ShmAttentionEnd(me, CONFIG)
        assert end.connect([Peer(expert, addresses[0])], PATIENCE_S) == {}
        ticket = end.dispatch([parcel(me, expert)])
        assert told(pipe) == "received"
        started_s = time.monotonic()
        os.kill(child.pid or 0, signal.SIGKILL)
        [outcome] = end.combine(ticket, PATIENCE_S)
        assert time.monotonic() - started_s < PATIENCE_S / 10
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.PEER_LOST
        end.close()


def test_exchanges_between_processes(addresses: list[str]) -> None:
    """The same rows as in one process, from a life that is not ours."""
    me, expert = identity(), identity("expert-0").member
    with process(expert_process, False) as (_, pipe):
        addresses.append(told(pipe))
        end = ShmAttentionEnd(me, CONFIG)
        assert end.connect([Peer(expert, addresses[0])], PATIENCE_S) == {}
        for number in range(50):
            sent = parcel(me, expert, number, rows=number % 9, layer=number)
            ticket = end.dispatch([sent])
            [reply] = end.combine(ticket, PATIENCE_S)
            assert isinstance(reply, Reply)
            assert torch.equal(reply.rows, computed(sent))
            del reply
            end.release(ticket)
        end.close()


def test_an_attention_process_killed_leaves_nothing_at_the_expert(addresses: list[str]) -> None:
    """Its link is dropped; its parcel, answered late, bothers nobody."""
    end = ShmExpertEnd(identity("expert-0"), CONFIG)
    addresses.append(end.address)
    alone = footprint()
    with process(attention_process, end.address) as (child, pipe):
        received = end.receive(3 * PATIENCE_S)
        assert received is not None
        assert told(pipe) == "dispatched"
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(PATIENCE_S)
    assert end.receive(0.0) is None
    answer(end, received)
    del received
    assert footprint() == alone
    end.close()
