"""The expert end of an exchange with one or several doors: one thread serves the links of all of them in turn.

Everything happens within `receive` and `pulse`: strangers are greeted, links of the dead dropped, parcels taken
from the links in turn. A peer that breaks the rules loses its link, with the reason in the log, and no other
peer notices. How it waits is said in watch.py.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from router.config import RouterConfig
from router.errors import EndClosed, PeerGone, TransportError
from router.placement import Member
from router.transport import frame
from router.transport.attention_end import ADDRESS_SEPARATOR
from router.transport.base import UNTIMED, LinkIdentity, Parcel, RefusalReason, Spent
from router.transport.complaints import Complaints
from router.transport.handshake import superseded
from router.transport.link import HOST, Door, ExpertLink, LinkedParcel
from router.transport.patience import PULSES
from router.transport.watch import READABLE, Watch

_log = logging.getLogger(__name__)

_UNSERVED_MAX = 16  # parcels taken in a row before doors and the dead get a look


class LinkedExpertEnd:
    def __init__(
        self, identity: LinkIdentity, config: RouterConfig, doors: Sequence[Door], device: torch.device = HOST
    ) -> None:
        """`doors`: all for rows on `device`."""
        self.device = device
        self.address = ADDRESS_SEPARATOR.join(door.address for door in doors)
        self._limits = frame.limits_of(identity, config)
        self._doors = doors
        self._complaints = Complaints(_log, self.address)
        self._turns: deque[ExpertLink] = deque()
        self._unserved = 0
        self._pulse_every_s = config.combine_timeout_s / PULSES
        self._pulse_due_s = 0.0
        self._wake_bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = False
        self._watch = Watch(config.stay_awake_s)
        self._watch.add(self._wake_bell, READABLE, self._hear_bell)
        for door in doors:
            door.open(self._watch, self._linked, self._admit)
        self._closed = False

    def receive(self, timeout_s: float) -> Parcel | None:
        if self._closed:
            raise EndClosed(f"expert end at {self.address!r}: closed")
        deadline_s = time.monotonic() + timeout_s
        is_over = False
        while True:
            if self._unserved >= _UNSERVED_MAX:
                self._serve(0.0)
            if self._woken:
                self._woken = False
                return None
            parcel = self._next()
            if parcel is not None:
                self._unserved += 1
                return parcel
            if is_over:  # whatever goes on ringing
                return None
            left_s = deadline_s - time.monotonic()
            is_over = left_s <= 0
            self._serve(max(0.0, left_s))

    def _next(self) -> LinkedParcel | None:
        for _ in range(len(self._turns)):
            link = self._turns[0]
            self._turns.rotate(-1)
            try:
                parcel = link.poll()
            except TransportError as error:
                self._drop(link, error)
                continue
            if parcel is not None:
                return parcel
        return None

    def _serve(self, wait_s: float) -> None:
        self._unserved = 0
        self._watch.wait(wait_s)

    def _hear_bell(self) -> None:
        os.eventfd_read(self._wake_bell)
        self._woken = True

    def _linked(self) -> list[Member]:
        return [link.sender for link in self._turns]

    def _admit(self, link: ExpertLink) -> None:
        """It takes the place of earlier links of the same worker."""
        gone = superseded(link.sender, self._linked())
        for earlier in [earlier for earlier in self._turns if earlier.sender in gone]:
            self._drop(earlier, PeerGone("superseded by a new link"))
        self._turns.append(link)
        link.join(self._watch)

    def reply(self, parcel: Parcel, rows: Tensor, spent: Spent = UNTIMED) -> None:
        frame.check_answer(parcel, rows, self._limits)
        self._answer(parcel, lambda own: own.link.answer(own, rows, spent))

    def refuse(self, parcel: Parcel, reason: RefusalReason, detail: str = "") -> None:
        self._answer(parcel, lambda own: own.link.refuse(own, reason, detail))

    def _answer(self, parcel: Parcel, send: Callable[[LinkedParcel], None]) -> None:
        if not isinstance(parcel, LinkedParcel):
            raise TypeError(f"parcel: {type(parcel).__name__}; must be one that receive returned")
        link = parcel.link
        if link.closed:
            return
        try:
            send(parcel)
        except TransportError as error:
            self._drop(link, error)

    def pulse(self) -> None:
        self._for_each(lambda link: link.begin())
        now_s = time.monotonic()
        if now_s < self._pulse_due_s:
            return
        self._pulse_due_s = now_s + self._pulse_every_s
        self._serve(0.0)
        self._for_each(lambda link: link.pulse() if link.owes else None)

    def _for_each(self, act: Callable[[ExpertLink], None]) -> None:
        for link in list(self._turns):
            try:
                act(link)
            except TransportError as error:
                self._drop(link, error)

    def wake(self) -> None:
        if not self._closed:
            os.eventfd_write(self._wake_bell, 1)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for door in self._doors:
            door.close()  # first: it sees to it that what was answered is sent
        while self._turns:
            self._drop(self._turns[0], PeerGone("closed"))
        self._complaints.close()
        for door in self._doors:
            door.let_go()
        self._watch.close()
        os.close(self._wake_bell)

    def _drop(self, link: ExpertLink, why: TransportError) -> None:
        if isinstance(why, PeerGone):
            _log.info("%s: link to %s dropped: %s", self.address, link.sender, str(why))
        else:
            self._complaints.note(f"{why}, from {link.sender}")
        link.closed = True
        self._turns.remove(link)
        link.close()
