"""One side of one bidirectional gRPC stream, as a link uses it: messages out, messages in, a bell, an end.

gRPC's blocking interface, with its threads: measured 317 us there and back for 12 KB, against 419 on an asyncio
loop in a thread (two cores, loopback). gRPC's own threads append what comes while they decode it, and take what is
to be sent; the thread of the end only ever looks, and waits for the bell. A reader's thread has one message after
the other come, and is in no message's way: that is 6 to 9 % of the way there and back. Both queues are bounded by
what a link may carry: a peer that exceeds it has broken the rules.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import grpc

from router.config import RouterConfig
from router.errors import FrameError, PeerGone, TransportError
from router.transport import frame
from router.transport.link import Incoming, Span, occupied_bytes_max

FRAMES_MAX = 512  # held or waiting, on one link in one direction
_REGIONS_KEPT = 8  # of frames read no more, for the next ones
_REGION_BYTES_MIN, _REGION_BYTES_MAX = 16 << 10, 256 << 10  # of those that are kept
REFUSED = grpc.StatusCode.PERMISSION_DENIED  # the status of a call whose hello was refused; its details say why
PULSES_PER_S_MAX = 1000  # heard on one link; a worker sends four in its `combine_timeout_s`


class HeldSpan(Span):
    """Of a frame in a region of its own."""

    __slots__ = ("region",)

    def __init__(self, nbytes: int, region: frame.Region) -> None:
        super().__init__(nbytes)
        self.region = region


class FrameStream:
    def __init__(self, config: RouterConfig, bell: int, cancel: Callable[[], object] = lambda: None) -> None:
        """`bell`: an eventfd, rung when something came or the stream ended."""
        self.frames: deque[bytes] = deque()  # arrived, not yet taken
        self.gone = ""  # why the stream has ended, once it has
        self._overran = False  # the peer, what it may send
        self.heard_s = time.monotonic()  # when the last message came
        self.region: Callable[[memoryview, frame.FrameLimits], frame.Region] = frame.Region  # of what comes
        self.pulse: bytes | None = None  # a message that says only that the peer is at work
        self._reading: frame.Region | None = None  # where the frame lies that was found and not yet taken
        self._regions: deque[frame.Region] = deque(maxlen=_REGIONS_KEPT)  # free, of few sizes
        self._bytes_max = occupied_bytes_max(config)
        self._bell = bell
        self.cancel = cancel  # ends the call at once
        self._speech: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._said_bytes = 0  # in all: written by the end's thread
        self._sent_bytes = 0  # of them taken by gRPC: written by its thread
        self._came = [0, 0]  # frames and bytes in all: written by gRPC's thread
        self._pulses, self._pulses_since_s = 0, self.heard_s
        self._let_go = [0, 0]  # of them read no more: written by the end's thread

    @property
    def held(self) -> tuple[int, int]:
        """Frames and bytes that have come and are not let go."""
        return self._came[0] - self._let_go[0], self._came[1] - self._let_go[1]

    @property
    def unsent(self) -> int:
        return self._speech.qsize()

    def say(self, message: bytes) -> None:
        """Queue it. Raises TransportError if the peer does not take what it asked for."""
        unsent = self._said_bytes - self._sent_bytes
        if unsent + len(message) > 2 * self._bytes_max:  # one peer's credit, and pulses
            raise TransportError(f"link: the peer has not taken {unsent} bytes")
        self._said_bytes += len(message)
        self._speech.put(message)

    def next(self, limits: frame.FrameLimits) -> Incoming | None:
        """The next frame, not yet taken. Raises TransportError when there will be none."""
        ending = self.ending()  # looked at first: what came before the end still counts
        if not self.frames:
            if ending is not None:
                raise ending
            return None
        message = self.frames[0]
        if len(message) < frame.HEADER_BYTES:
            raise FrameError(f"frame: {len(message)} bytes; a header alone has {frame.HEADER_BYTES}")
        self._reading = self._copied(message, limits)
        return Incoming(self._reading, 0, len(message))

    def _copied(self, message: bytes, limits: frame.FrameLimits) -> frame.Region:
        """A copy, as what gRPC gives may not be written to, and tensors may only view what may. In a region
        that was read before, if there is one: it still has its views, which take long to make."""
        if len(message) > _REGION_BYTES_MAX:  # copying takes longer than the views
            return self.region(memoryview(bytearray(message)), limits)
        nbytes = max(_REGION_BYTES_MIN, 1 << (len(message) - 1).bit_length())
        region = next((free for free in self._regions if len(free.view) == nbytes), None)
        if region is None:
            region = self.region(memoryview(bytearray(nbytes)), limits)
        else:
            self._regions.remove(region)
        region.view[: len(message)] = message
        return region

    def ending(self) -> TransportError | None:
        """Why nothing more will come, once the stream has ended."""
        if not self.gone:
            return None
        return TransportError(self.gone) if self._overran else PeerGone(self.gone)

    def take(self, nbytes: int) -> Span:
        """Pass the frame that `next` found."""
        assert self._reading is not None, "found before it is taken"
        self.frames.popleft()
        span, self._reading = HeldSpan(nbytes, self._reading), None
        return span

    def take_welcome(self) -> bytes:
        """The first message, which is no frame."""
        message = self.frames.popleft()
        self._count_off(len(message))
        return message

    def let_go(self, span: Span) -> None:
        """A frame that was taken is read no more. Once."""
        assert isinstance(span, HeldSpan)
        span.freed = True
        self._count_off(span.nbytes)
        if len(span.region.view) <= _REGION_BYTES_MAX:
            self._regions.append(span.region)

    def _count_off(self, nbytes: int) -> None:
        self._let_go = [self._let_go[0] + 1, self._let_go[1] + nbytes]

    def speech(self) -> Iterator[bytes]:
        """What gRPC sends, until hung up."""
        while (message := self._speech.get()) is not None:
            self._sent_bytes += len(message)
            yield message

    def arrive(self, message: bytes) -> bytes:
        """gRPC's thread, which takes this for what decodes a message."""
        if not self._overran:
            self._overran = not (self._hear_pulse() if message == self.pulse else self._take_in(message))
        return message

    def _hear_pulse(self) -> bool:
        """Pulses take no room, so they are bounded by their number."""
        now_s = time.monotonic()
        self.heard_s = now_s
        if now_s - self._pulses_since_s > 1.0:
            self._pulses, self._pulses_since_s = 0, now_s
        self._pulses += 1
        return self._pulses <= PULSES_PER_S_MAX

    def _take_in(self, message: bytes) -> bool:
        self.heard_s = time.monotonic()
        frames, nbytes = self.held
        if frames >= FRAMES_MAX or nbytes + len(message) > self._bytes_max:
            return False
        self._came = [self._came[0] + 1, self._came[1] + len(message)]
        self.frames.append(message)
        self.ring()
        return True

    def read(self, messages: Iterator[bytes]) -> None:
        """The reader's thread: has each message come, until the stream ends."""
        try:
            for _ in messages:
                if self._overran:
                    self.gone = "link: the peer did not keep to its capacity"
                    self.cancel()
                    break
        except grpc.RpcError as error:
            self.gone = _why(error)
        self.gone = self.gone or f"the peer has left the stream, or sent over {self._bytes_max} bytes at once"
        self.hang_up()
        self.ring()

    def ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def hang_up(self) -> None:
        """What was said before is still sent."""
        self._speech.put(None)

    def end(self) -> None:
        """At once."""
        self.hang_up()
        self.cancel()


def join_all(threads: list[threading.Thread], timeout_s: float) -> None:
    """All but this one."""
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout_s)


def _why(error: grpc.RpcError) -> str:
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if code is None or details is None:  # gRPC does not say which
        return ""
    if code() is REFUSED:
        return str(details())
    return f"the peer's stream: {code().name}, {details()}"
