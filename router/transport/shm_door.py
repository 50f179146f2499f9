"""The door of shared memory: strangers of this host, greeted one by one within the waits of their expert end."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Collection
from functools import partial

from router.config import RouterConfig
from router.errors import LinkRefused
from router.placement import Member
from router.transport.base import LinkIdentity
from router.transport.complaints import Complaints
from router.transport.lane import Lanes
from router.transport.link import Admit
from router.transport.shm_handshake import answer, listen, refuse_other_user, turn_away
from router.transport.watch import READABLE, Watch

_log = logging.getLogger(__name__)


class ShmDoor:
    def __init__(self, identity: LinkIdentity, config: RouterConfig, lanes: Lanes | None = None) -> None:
        self._identity, self._config, self._lanes = identity, config, lanes
        self._listener, self.address = listen(identity, config, lanes)
        self._complaints = Complaints(_log, self.address)
        self._strangers: dict[int, tuple[socket.socket, float]] = {}  # by descriptor; greeting until, in s
        self._watch: Watch | None = None

    def open(self, watch: Watch, linked: Callable[[], Collection[Member]], admit: Admit) -> None:
        self._watch, self._linked, self._admit = watch, linked, admit
        watch.add(self._listener.fileno(), READABLE, self._let_in)

    def close(self) -> None:
        for sock, _ in self._strangers.values():
            sock.close()
        self._strangers.clear()
        self._listener.close()
        self._complaints.close()

    def let_go(self) -> None:
        if self._lanes is not None:
            self._lanes.close()

    def _let_in(self) -> None:
        assert self._watch is not None
        now_s = time.monotonic()
        for descriptor, (sock, until_s) in list(self._strangers.items()):
            if until_s < now_s:
                self._watch.remove(descriptor)
                del self._strangers[descriptor]
                self._turn_away(sock, "hello: did not come in time")
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return  # it left again
        except OSError as error:
            # No descriptor is left, as when strangers at another door took them. This one waits outside meanwhile.
            self._complaints.note(f"accept: {error}")
            return
        sock.setblocking(False)
        try:
            refuse_other_user(sock)  # first: nobody else's strangers take the places of our own
            if len(self._strangers) >= self._config.peers_max:
                raise LinkRefused(f"peers: {self._config.peers_max} are greeting already")
        except LinkRefused as error:
            self._turn_away(sock, str(error))
            return
        self._strangers[sock.fileno()] = (sock, now_s + self._config.connect_timeout_s)
        self._watch.add(sock.fileno(), READABLE, partial(self._greet, sock.fileno()))

    def _greet(self, descriptor: int) -> None:
        assert self._watch is not None
        sock, _ = self._strangers.pop(descriptor)
        self._watch.remove(descriptor)
        try:
            link = answer(sock, self._identity, self._linked(), self._config, self._lanes)
        except LinkRefused as error:
            self._complaints.note(str(error))
            return
        self._admit(link)

    def _turn_away(self, sock: socket.socket, why: str) -> None:
        self._complaints.note(why)
        turn_away(sock, self._identity.member, why)
