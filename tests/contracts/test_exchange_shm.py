"""The shared-memory transport keeps the exchange contract, between processes and against bad peers too."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from router.config import PAGE_BYTES, RouterConfig
from router.transport.base import (
    AttentionEnd,
    ExpertEnd,
    LinkIdentity,
    Parcel,
    Refusal,
    RefusalReason,
    Reply,
)
from router.transport.select import attention_end, expert_end
from router.transport.shm_handshake import ShmDialer
from router.transport.shm_ring import RingMemory
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, computed, identity, parcel
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
        greeting = ShmDialer(identity("attention-vandal"), CONFIG).greet(expert.peer, expert.end.address)
        wiring = greeting.wiring
        wiring.sock.settimeout(PATIENCE_S)
        greeting.welcomed()
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
            received.link._wires.wiring.segment.replies.head[0] = 2**40  # type: ignore[attr-defined]
            os.eventfd_write(received.link._wires.wiring.replies_bell, 1)  # type: ignore[attr-defined]

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
