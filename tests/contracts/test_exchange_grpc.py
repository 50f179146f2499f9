"""The gRPC transport keeps the exchange contract, against strangers and peers that break the rules too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
import torch

from router.config import PAGE_BYTES, RouterConfig
from router.errors import TransportError
from router.transport.base import AttentionEnd, ExpertEnd, LinkIdentity, Parcel, Refusal, RefusalReason, Reply
from router.transport.frame import HEADER_BYTES, limits_of
from router.transport.grpc_channel import HELLO_KEY, METHOD, dial
from router.transport.grpc_stream import FrameStream
from router.transport.handshake import Hello, hello
from router.transport.select import attention_end, expert_end
from router.transport.wire import hello_to_bytes, welcome_from_bytes
from tests.contracts.exchange_parties import (
    CONFIG,
    PATIENCE_S,
    ExpertThread,
    computed,
    identity,
    parcel,
)
from tests.contracts.exchange_suite import ExchangeSuite


class TestGrpcExchange(ExchangeSuite):
    def attention_end(self, who: LinkIdentity, config: RouterConfig) -> AttentionEnd:
        return attention_end("grpc", who, config)

    def expert_end(self, who: LinkIdentity, config: RouterConfig) -> ExpertEnd:
        return expert_end("grpc", who, config)

    def test_bytes_in_flight_are_bounded_and_come_back(self) -> None:
        """Our own credit, beside HTTP/2's: what is beyond it is refused, and nothing of it is sent."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert, config=replace(CONFIG, link_bytes_max=PAGE_BYTES))
        tickets = [end.dispatch([parcel(me, expert.member, number, rows=8)]) for number in range(9)]
        outcomes = [end.combine(ticket, PATIENCE_S)[0] for ticket in tickets]
        sent = sum(isinstance(outcome, Reply) for outcome in outcomes)
        assert 1 <= sent < 9
        for refused in outcomes[sent:]:
            assert isinstance(refused, Refusal)
            assert refused.reason is RefusalReason.OVERLOADED
        for ticket in tickets:
            end.release(ticket)
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member, 10, rows=8)]), PATIENCE_S)
        assert isinstance(outcome, Reply)

    @pytest.mark.parametrize(
        "words",
        [[b""], [b"garbage!" * 16], [b"\0" * (CONFIG.link_bytes_max // 2 + 1)], [b"\0" * 30_000] * 2],
        ids=["empty", "noise", "too large", "too much"],
    )
    def test_a_vandal_loses_its_stream_and_nobody_else(self, words: list[bytes]) -> None:
        """Frames of a peer that was let in are still a stranger's words."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        greeting = hello(identity("attention-vandal"), expert.member)
        assert ended(call(expert, greeting, iter(words))) in (
            grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK,
        )  # fmt: skip
        well(end, me, expert)

    def test_a_vandal_among_the_experts_is_a_lost_peer(self) -> None:
        """The attention worker goes on without it, and says what was wrong."""

        def scribble(_: ExpertEnd, received: Parcel) -> None:
            received.link._stream.say(b"garbage!" * 16)  # type: ignore[attr-defined]

        expert = self.expert(scribble)
        me = identity()
        end = self.attention(me, expert)
        [outcome] = end.combine(end.dispatch([parcel(me, expert.member)]), PATIENCE_S)
        assert isinstance(outcome, Refusal)
        assert outcome.reason is RefusalReason.PEER_LOST
        assert "begins with" in outcome.detail

    def test_a_stranger_without_the_token_gets_nothing_read(self) -> None:
        """The hello is judged before the first message, and no other method is served."""
        expert = self.expert()
        me = identity()
        end = self.attention(me, expert)
        for greeting in (hello(identity(token="guess"), expert.member), b"\xff" * 64, b""):
            with pytest.raises(Ended, match="PERMISSION_DENIED"):
                list(call(expert, greeting, iter(())))
        with dial(expert.end.address.removeprefix("grpc:"), CONFIG) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/expertmesh.v1.Exchange/Other")(b"", timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        well(end, me, expert)

    def test_answers_that_a_peer_does_not_take_are_bounded(self) -> None:
        """It may send parcels for ever without reading a reply: its link ends before our memory does."""
        stream = FrameStream(CONFIG, bell=-1, cancel=lambda: None)
        words = b"\0" * (CONFIG.link_bytes_max // 2)
        stream.say(words)
        stream.say(words)
        with pytest.raises(TransportError, match=f"has not taken {2 * len(words)} bytes"):
            stream.say(b"\0")
        assert next(stream.speech()) == words
        stream.say(words)

    def test_a_small_frame_holds_little_whatever_came_before_it(self) -> None:
        """Credit counts the bytes of messages, so what they are copied into may not be far more."""
        config, bell = replace(CONFIG, link_bytes_max=16 << 20), os.eventfd(0)
        limits, stream = limits_of(identity(), config), FrameStream(config, bell)
        held, sizes = [], [2 << 20, 200 << 10, *[HEADER_BYTES] * 20, 200 << 10, 20 << 10, 2 << 20]
        for nbytes in sizes:
            stream.arrive(b"\0" * nbytes)
            found = stream.next(limits)
            assert found is not None
            assert len(found.region.view) <= max(2 * nbytes, 16 << 10)
            held.append((found.region, stream.take(found.nbytes)))
        assert len({id(region) for region, _ in held}) == len(sizes), "two frames in hand share no memory"
        for _, span in held:
            stream.let_go(span)
        assert stream.held == (0, 0)
        stream.arrive(b"\0" * HEADER_BYTES)
        again = stream.next(limits)
        assert again is not None
        assert any(again.region is region for region, _ in held), "its views are kept"
        os.close(bell)

    def test_a_host_that_is_not_ours_is_refused_by_name(self) -> None:
        with pytest.raises(TransportError, match=r"host: '192\.0\.2\.1' cannot be listened on"):
            expert_end("grpc", identity("expert-0"), CONFIG, host="192.0.2.1")


def call(expert: ExpertThread, greeting: Hello | bytes, messages: Iterator[bytes]) -> Iterator[bytes]:
    """What the expert says to a caller of any kind."""
    data = greeting if isinstance(greeting, bytes) else hello_to_bytes(greeting)
    with dial(expert.end.address.removeprefix("grpc:"), replace(CONFIG, link_bytes_max=1 << 20)) as channel:
        answers = channel.stream_stream(METHOD)(messages, metadata=((HELLO_KEY, data),), timeout=PATIENCE_S)
        try:
            yield from answers
        except grpc.RpcError as error:
            raise Ended(error.code()) from error


class Ended(Exception):
    pass


def ended(answers: Iterator[bytes]) -> grpc.StatusCode:
    """The status with which a stream ended, that was at most welcomed."""
    try:
        assert [welcome_from_bytes(answer).refused for answer in answers] == [""]
    except Ended as end:
        code: grpc.StatusCode = end.args[0]
        return code
    return grpc.StatusCode.OK


def well(end: AttentionEnd, me: LinkIdentity, expert: ExpertThread) -> None:
    """A link that nobody touched still serves."""
    sent = parcel(me, expert.member)
    [reply] = end.combine(end.dispatch([sent]), PATIENCE_S)
    assert isinstance(reply, Reply)
    assert torch.equal(reply.rows, computed(sent))
