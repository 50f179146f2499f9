"""The expert end of the exchange on one host, between processes.

Everything happens within `receive`: strangers are greeted, links of the dead dropped, parcels taken from the
links in turn. A peer that breaks the rules loses its link, with the reason in the log, and no other peer
notices. Waiting is epoll, never spinning: bells watched for edges, sockets for their closing.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections import deque

from torch import Tensor

from router.config import RouterConfig
from router.errors import EndClosed, LinkRefused, TransportError
from router.transport import frame
from router.transport.base import LinkIdentity, Parcel, RefusalReason
from router.transport.handshake import superseded
from router.transport.shm_handshake import answer, listen, turn_away
from router.transport.shm_link import ExpertLink, ShmParcel

_log = logging.getLogger(__name__)

_EVENTS_MAX = 32  # of one wait; more come with the next
_UNSERVED_MAX = 16  # parcels taken in a row before sockets get a look
_HUNG_UP = select.EPOLLIN | select.EPOLLRDHUP  # EPOLLHUP and EPOLLERR are always watched
_RUNG = select.EPOLLIN | select.EPOLLET


class ShmExpertEnd:
    def __init__(self, identity: LinkIdentity, config: RouterConfig) -> None:
        self._identity = identity
        self._config = config
        self._limits = frame.limits_of(identity, config)
        self._listener, self.address = listen(identity, config)
        self._wake_bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._strangers: dict[int, tuple[socket.socket, float]] = {}  # by descriptor; greeting until, in s
        self._links: dict[int, ExpertLink] = {}  # by descriptor of their socket
        self._turns: deque[ExpertLink] = deque()
        self._unserved = 0
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._wake_bell, select.EPOLLIN)
        self._closed = False

    def receive(self, timeout_s: float) -> Parcel | None:
        if self._closed:
            raise EndClosed(f"expert end at {self.address!r}: closed")
        deadline_s = time.monotonic() + timeout_s
        while True:
            if self._unserved >= _UNSERVED_MAX and self._serve(0.0):
                return None
            parcel = self._next()
            if parcel is not None:
                self._unserved += 1
                return parcel
            left_s = deadline_s - time.monotonic()
            if self._serve(max(0.0, left_s)):
                return None
            if left_s <= 0:
                return self._next()

    def _next(self) -> ShmParcel | None:
        for _ in range(len(self._turns)):
            link = self._turns[0]
            self._turns.rotate(-1)
            try:
                parcel = link.poll()
            except TransportError as error:
                self._drop(link, str(error))
                continue
            if parcel is not None:
                return parcel
        return None

    def _serve(self, wait_s: float) -> bool:
        """Wait for anything at all, and see to it. True if `wake` was called."""
        self._unserved = 0
        woken = knocked = False
        for descriptor, _ in self._epoll.poll(wait_s, _EVENTS_MAX):
            if descriptor == self._wake_bell:
                os.eventfd_read(self._wake_bell)
                woken = True
            elif descriptor == self._listener.fileno():
                knocked = True
            elif descriptor in self._strangers:
                self._greet(descriptor)
            elif descriptor in self._links:
                self._drop(self._links[descriptor], "the peer has closed its socket")
        if knocked:  # last: a new socket may take the number of one just closed
            self._admit_stranger()
        return woken

    def _admit_stranger(self) -> None:
        now_s = time.monotonic()
        for descriptor, (sock, until_s) in list(self._strangers.items()):
            if until_s < now_s:
                self._epoll.unregister(descriptor)
                del self._strangers[descriptor]
                turn_away(sock, self._identity.member, "hello: did not come in time")
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return  # it left again
        except OSError as error:
            raise TransportError(f"accept at {self.address!r}: {error}") from error
        sock.setblocking(False)
        if len(self._strangers) >= self._config.peers_max:
            turn_away(sock, self._identity.member, f"peers: {self._config.peers_max} are greeting already")
            return
        self._strangers[sock.fileno()] = (sock, now_s + self._config.connect_timeout_s)
        self._epoll.register(sock, select.EPOLLIN)

    def _greet(self, descriptor: int) -> None:
        sock, _ = self._strangers.pop(descriptor)
        self._epoll.unregister(descriptor)
        linked = {link.sender: link for link in self._turns}
        try:
            link = answer(sock, self._identity, linked, self._config)
        except LinkRefused as error:
            _log.warning("%s: refused a link: %s", self.address, error)
            return
        for member in superseded(link.sender, linked):
            self._drop(linked[member], "superseded by a new link")
        self._links[descriptor] = link
        self._turns.append(link)
        self._epoll.register(descriptor, _HUNG_UP)
        self._epoll.register(link.wiring.parcels_bell, _RUNG)

    def reply(self, parcel: Parcel, rows: Tensor) -> None:
        frame.check_answer(parcel, rows, self._limits)
        self._answer(parcel, rows)

    def refuse(self, parcel: Parcel, reason: RefusalReason, detail: str = "") -> None:
        self._answer(parcel, (reason, detail))

    def _answer(self, parcel: Parcel, answer: Tensor | tuple[RefusalReason, str]) -> None:
        if not isinstance(parcel, ShmParcel):
            raise TypeError(f"parcel: {type(parcel).__name__}; must be one that receive returned")
        link = parcel.link
        if link.closed:
            return
        try:
            if isinstance(answer, Tensor):
                link.reply(parcel, answer)
            else:
                link.refuse(parcel, *answer)
        except TransportError as error:
            self._drop(link, str(error))

    def wake(self) -> None:
        if not self._closed:
            os.eventfd_write(self._wake_bell, 1)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        while self._turns:
            self._drop(self._turns[0], "closed")
        for sock, _ in self._strangers.values():
            sock.close()
        self._strangers.clear()
        self._listener.close()
        self._epoll.close()
        os.close(self._wake_bell)

    def _drop(self, link: ExpertLink, why: str) -> None:
        _log.info("%s: link to %s dropped: %s", self.address, link.sender, why)
        link.closed = True
        descriptor = link.wiring.sock.fileno()
        self._turns.remove(link)
        del self._links[descriptor]
        self._epoll.unregister(descriptor)
        self._epoll.unregister(link.wiring.parcels_bell)
        link.wiring.close()
