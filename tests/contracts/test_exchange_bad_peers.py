"""A peer that breaks the rules is thrown out, with the reason in the log; the one beside it does not notice."""

from __future__ import annotations

import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from router.config import PAGE_BYTES, RouterConfig
from router.transport import frame
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Refusal, RefusalReason, Reply
from router.transport.complaints import TOLD_MAX
from router.transport.grpc_channel import CONNECTIONS_PER_PEER, METHOD
from router.transport.handshake import hello
from router.transport.select import attention_end, expert_end
from router.transport.shm_bell import new_bell
from router.transport.shm_handshake import ShmDialer
from router.transport.shm_ring import create_segment
from router.transport.wire import hello_to_bytes
from tests.contracts.exchange_link_suite import assert_nothing_left, footprint
from tests.contracts.exchange_parties import (
    CONFIG,
    PATIENCE_S,
    ExpertThread,
    answer,
    computed,
    connect,
    identity,
    parcel,
)
from tests.contracts.exchange_stage import ExchangeStage
from tests.contracts.exchange_strangers import (
    END_STREAM,
    address_of,
    call_without_window,
    http2_frames,
    knocking,
    no_descriptor_left,
)
from tests.contracts.exchange_strangers import HEADERS as HEADERS_FRAME
from tests.contracts.exchange_vandals import (
    HEADERS,
    Words,
    honest_parcel,
    rude_attention,
    rude_expert,
    with_field,
)

ASKED = pytest.mark.parametrize(("name", "words", "reason"), HEADERS, ids=[name for name, _, _ in HEADERS])


class BadPeers(ExchangeStage):
    kind: str

    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end(self.kind, who, config)

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end(self.kind, who, config)

    @contextmanager
    def busy(self, expert: ExpertThread) -> Iterator[None]:
        """Beside what happens within, a well-behaved attention worker exchanges with `expert` all the time."""
        me, enough, failures = identity("attention-well"), threading.Event(), []
        end = self.attention(me, expert)

        def exchange() -> None:
            number = 0
            while number < 5 or not enough.is_set():
                number += 1
                sent = parcel(me, expert.member, number, rows=number % 9)
                ticket = end.dispatch([sent])
                [outcome] = end.combine(ticket, PATIENCE_S)
                if not (isinstance(outcome, Reply) and torch.equal(outcome.rows, computed(sent))):
                    failures.append(outcome)
                end.release(ticket)

        thread = threading.Thread(target=exchange)
        thread.start()
        try:
            yield
        finally:
            enough.set()
            thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert failures == []
        assert end.lost() == frozenset()

    @ASKED
    def test_a_bad_frame_of_an_attention_worker(
        self, name: str, words: Words, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        expert = self.expert()
        with self.busy(expert):
            rude_attention(
                self.kind, expert.peer, "attention-rude", words(honest_parcel(identity(), expert.member))
            )
        [record] = [record for record in caplog.messages if "attention-rude" in record]
        assert reason in record

    @ASKED
    def test_a_bad_frame_of_an_expert_worker(
        self, name: str, words: Words, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert reason in self._answered_rudely(words, caplog)

    def test_an_answer_nobody_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        """Of another ticket, or one more than was asked for."""
        assert "not asked for" in self._answered_rudely(with_field("ticket", 77), caplog)

    def test_more_answers_than_were_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        """The first is used; at the next look the link is gone."""
        me, who = identity(), identity("expert-rude")
        with rude_expert(self.kind, who, lambda honest: [honest] * 3) as rude:
            end = self.attention(me)
            assert connect(end, [rude]) == {}
            number = 0
            while not end.lost():
                number += 1
                end.combine(end.dispatch([parcel(me, who.member, number)]), PATIENCE_S)
        assert "not asked for" in caplog.text

    def _answered_rudely(self, words: Words, caplog: pytest.LogCaptureFixture) -> str:
        """The reason with which a rude expert worker is lost, while another answers the same ticket."""
        well, me, who = self.expert(who=identity("expert-0")), identity(), identity("expert-rude")
        end = self.attention(me)
        with rude_expert(self.kind, who, words) as rude, self.busy(well):
            assert connect(end, [rude, well.peer]) == {}
            sent = [parcel(me, to) for to in (who.member, well.member)]
            refusal, reply = end.combine(end.dispatch(sent), PATIENCE_S)
        assert isinstance(reply, Reply)
        assert torch.equal(reply.rows, computed(sent[1]))
        assert isinstance(refusal, Refusal)
        assert refusal.reason is RefusalReason.PEER_LOST
        assert end.lost() == {who.member}
        assert refusal.detail in caplog.text
        return refusal.detail

    def test_more_parcels_than_a_link_may_have_in_flight(self, caplog: pytest.LogCaptureFixture) -> None:
        """It does not wait for an answer: what it may make us hold is bounded."""
        holding = threading.Event()

        def hold(end: ExpertEnd, received: object) -> None:
            holding.set()

        expert = self.expert(hold)
        small = parcel(identity(), expert.member, rows=0)
        said = frame.parcel_message(small, 0, frame.limits_of(identity(), CONFIG))
        flood = [said] * (CONFIG.parcels_in_flight_max + 1)
        rude_attention(self.kind, expert.peer, "attention-rude", flood)
        assert holding.is_set()
        assert "more than 16 parcels in flight (parcels_in_flight_max)" in caplog.text

    def test_strangers_fill_neither_log_nor_memory(self, caplog: pytest.LogCaptureFixture) -> None:
        """Anybody may knock; what is the same is told a few times, then counted."""
        expert = self.expert()
        stranger = self.attention(identity("attention-rude", token="guess"))
        with self.busy(expert):
            for _ in range(60 if self.kind == "shm" else 15):
                assert connect(stranger, [expert.peer])[expert.member].startswith("token: ")
        expert.leave()
        told = [message for message in caplog.messages if "token: not this cluster's" in message]
        assert len(told) == TOLD_MAX
        assert sum("more: token" in message for message in caplog.messages) == 1


class TestBadShmPeers(BadPeers):
    kind = "shm"

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda: [], "0 descriptors"),
            (lambda: [segment(), new_bell()], "2 descriptors"),
            (lambda: [segment(), new_bell(), new_bell(), new_bell()], "3 descriptors or more"),
            (lambda: [new_bell(), new_bell(), new_bell()], "not a memfd"),
            (lambda: [file(), new_bell(), new_bell()], "not a memfd"),
            (lambda: [segment(PAGE_BYTES), new_bell(), new_bell()], "must be"),
            (lambda: [unsealed(), new_bell(), new_bell()], "sealed against shrinking"),
            (lambda: [segment(), file(), new_bell()], "a bell is"),
            (lambda: [segment(), new_bell(), segment()], "a bell is"),
            (lambda: [segment(), os.open("/dev/null", os.O_RDWR), new_bell()], "a bell is"),
        ],
    )
    def test_descriptors_may_be_anything(
        self, make: Callable[[], list[int]], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Too few, too many, no memfd, too small, one that can shrink under us (SIGBUS), no eventfds."""
        expert = self.expert()
        with self.busy(expert):
            before = footprint()
            descriptors = make()
            with knocking(expert) as stranger:
                greeting = hello_to_bytes(hello(identity("attention-rude"), expert.member, CONFIG.link_bytes_max))
                socket.send_fds(stranger, [greeting], descriptors)
                assert reason in stranger.recv(4096).decode(errors="replace")
                assert stranger.recv(1) == b""
            for descriptor in descriptors:
                os.close(descriptor)
            assert_nothing_left(before)
        assert reason in caplog.text

    def test_a_bell_that_is_full_ends_the_link_not_the_worker(self, caplog: pytest.LogCaptureFixture) -> None:
        """Ringing it would block, or raise: its peer is lost, others are served."""
        expert = self.expert()
        with self.busy(expert):
            wiring = ShmDialer(identity("attention-rude"), CONFIG).greet(expert.peer, expert.peer.address).wiring
            wiring.sock.settimeout(PATIENCE_S)
            wiring.sock.recv(4096)
            os.eventfd_write(wiring.replies_bell, 2**64 - 2)
            said = honest_parcel(identity(), expert.member)
            wiring.segment.parcels.frames[: len(said)] = said
            wiring.segment.parcels.entries[0] = len(said) // 64
            wiring.segment.parcels.head[0] = 1
            os.eventfd_write(wiring.parcels_bell, 1)
            assert wiring.sock.recv(1) == b""
            wiring.close()
        assert "its count is full" in caplog.text

    def test_who_goes_on_ringing_does_not_keep_receive_beyond_its_time(self) -> None:
        """Otherwise a worker that is only rung would look hung, and could not end."""
        end = self.expert_end(identity("expert-0"), CONFIG)
        self.stack.callback(end.close)
        enough = threading.Event()
        bells: list[int] = []

        def go_on_ringing() -> None:
            while not enough.is_set():
                os.eventfd_write(bells[0], 1)

        peer = ExpertThread(end, identity("expert-0"), lambda *_: None).peer
        greeting = ShmDialer(identity("attention-rude"), CONFIG).greet(peer, peer.address)
        assert end.receive(0.0) is None
        while not end._turns:  # type: ignore[attr-defined]
            end.receive(0.001)
        bells.append(greeting.wiring.parcels_bell)
        thread = threading.Thread(target=go_on_ringing)
        thread.start()
        try:
            for _ in range(20):
                assert end.receive(0.001) is None
        finally:
            enough.set()
            thread.join()
            greeting.close()

    def test_silent_strangers_do_not_keep_others_out_for_long(self) -> None:
        """They hold a place each until their time is over, and not longer."""
        config = replace(CONFIG, peers_max=2, connect_timeout_s=0.05)
        expert = self.expert(config=config)
        with knocking(expert), knocking(expert):
            end = self.attention_end(identity(), config)
            self.stack.callback(end.close)
            for _ in range(1000):
                if not connect(end, [expert.peer]):
                    break
            assert end.transports() == {expert.member: "shm"}

    def test_without_a_descriptor_left_strangers_wait_and_the_linked_go_on(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Strangers of another door may take them all for a while: no reason to end."""
        end = self.expert_end(identity("expert-0"), CONFIG)
        self.stack.callback(end.close)
        expert = ExpertThread(end, identity("expert-0"), answer)
        with knocking(expert) as stranger:
            with no_descriptor_left():
                assert end.receive(0.0) is None
            stranger.send(b"")
            while "0 descriptors" not in caplog.text:
                assert end.receive(0.01) is None
        assert "accept: [Errno 24]" in caplog.text
        with expert:
            self.attention(identity(), expert)


class TestBadGrpcPeers(BadPeers):
    kind = "grpc"

    def test_more_connections_than_the_bound_are_not_taken(self) -> None:
        """Each holds a descriptor and memory of ours until it is cut off; those linked do not notice."""
        config = replace(CONFIG, peers_max=1, connect_timeout_s=30 * PATIENCE_S)  # nobody is cut off meanwhile
        expert = self.expert(config=config)
        with self.busy(expert), ExitStack() as strangers:
            where = address_of(expert)
            taken = [
                strangers.enter_context(socket.create_connection(where)) for _ in range(4 * CONNECTIONS_PER_PEER)
            ]
            waiting = select.poll()
            for stranger in taken:
                waiting.register(stranger, select.POLLRDHUP)
            refused: set[int] = set()
            while len(refused) <= 3 * CONNECTIONS_PER_PEER:  # one is that of the busy one
                gone = waiting.poll(PATIENCE_S / 4 * 1000)
                assert gone, f"{len(refused)} refused"
                for descriptor, _ in gone:
                    waiting.unregister(descriptor)
                    refused.add(descriptor)
            assert len(refused) == 3 * CONNECTIONS_PER_PEER + 1

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ([b""], "a header alone has"),
            ([b"x" * (1 << 20)], "or sent over 32768 bytes at once"),  # gRPC tells only that it has ended
            ([b"\0" * 16_000] * 4, "begins with"),
        ],
    )
    def test_empty_giant_and_too_many_bytes(
        self, words: list[bytes], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What is no frame at all."""
        caplog.set_level("INFO")
        expert = self.expert()
        with self.busy(expert):
            rude_attention("grpc", expert.peer, "attention-rude", words)
        assert reason in caplog.text

    def test_a_flood_of_empty_messages_takes_no_memory(self, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing is smaller; and it is a frame all the same."""
        expert = self.expert()
        with self.busy(expert):
            rude_attention("grpc", expert.peer, "attention-rude", [b""] * 5000)
        assert "a header alone has" in caplog.text or "capacity" in caplog.text

    def test_a_flood_of_pulses_is_the_loss_of_the_worker(self, caplog: pytest.LogCaptureFixture) -> None:
        """Each says that it is alive; thousands keep us from living."""
        me, who = identity(), identity("expert-rude")
        pulse = frame.pulse_message(who.member, me.member, frame.limits_of(me, CONFIG))
        assert "capacity" in self._answered_rudely(lambda _: [pulse] * 5000, caplog)

    @pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000])
    def test_what_speaks_no_grpc_is_cut_off(self, words: bytes) -> None:
        """Silence or noise on a raw connection: a descriptor of ours is not held for ever."""
        config = replace(CONFIG, connect_timeout_s=0.3)
        expert = self.expert(config=config)
        with self.busy(expert), socket.create_connection(address_of(expert), timeout=PATIENCE_S) as stranger:
            if words:
                stranger.send(words)
            while stranger.recv(4096):  # its settings, perhaps; then the end
                continue

    def test_a_stranger_who_takes_no_message_holds_no_place(self) -> None:
        """A window of nothing: a message of refusal would wait for it for ever, the end of the call does not."""
        expert = self.expert()
        with socket.create_connection(address_of(expert), timeout=PATIENCE_S) as stranger:
            stranger.sendall(call_without_window(METHOD))
            first = next(flags for kind, flags in http2_frames(stranger) if kind == HEADERS_FRAME)
        assert first & END_STREAM  # nothing of the answer waits behind it


def segment(ring_bytes: int = CONFIG.link_bytes_max) -> int:
    return create_segment(ring_bytes)


def unsealed() -> int:
    descriptor = os.memfd_create("expertmesh-unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 3 * PAGE_BYTES + 2 * CONFIG.link_bytes_max)
    return descriptor


def file() -> int:
    with tempfile.TemporaryFile() as opened:
        os.truncate(opened.fileno(), 3 * PAGE_BYTES + 2 * CONFIG.link_bytes_max)
        return os.dup(opened.fileno())
