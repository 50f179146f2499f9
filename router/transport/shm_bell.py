"""Bells of a shared-memory link: eventfds that one side rings and the other watches for edges, never reads.

Both sides hold both, so a peer may do with them what it likes, and loses its link by it. One thing no check
prevents, as a descriptor's flags are shared, too: who makes a bell blocking and then fills its count has our next
ring wait. That is somebody with our user id, who could stop us outright; in either case the other peers find us
silent, and plan again.
"""

from __future__ import annotations

import os

from router.errors import LinkRefused, TransportError

_KIND = "anon_inode:[eventfd]"


def new_bell() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def check_bell(descriptor: int) -> None:
    """Raises LinkRefused for anything else: a file cannot be watched, and what we write to it would stay."""
    kind = os.readlink(f"/proc/self/fd/{descriptor}")
    if kind != _KIND:
        raise LinkRefused(f"shm: a bell is {kind!r}; must be {_KIND!r}")
    os.set_blocking(descriptor, False)


def ring(bell: int) -> None:
    """Raises TransportError if the peer has filled its count, which honest ringing does not in a lifetime."""
    try:
        os.eventfd_write(bell, 1)
    except BlockingIOError as error:
        raise TransportError("bell: its count is full; the peer has written to it") from error
