"""Ends of the shm exchange in processes of their own: what `multiprocessing` spawns in tests."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from router.transport.base import Peer
from router.transport.shm_attention import ShmAttentionEnd
from router.transport.shm_expert import ShmExpertEnd
from tests.contracts.exchange_parties import CONFIG, PATIENCE_S, answer, identity, parcel


def expert_process(pipe: Connection, silent: bool) -> None:
    """Tell the address, then answer, or else only tell that a parcel has come, until killed."""
    end = ShmExpertEnd(identity("expert-0"), CONFIG)
    pipe.send_bytes(end.address.encode())
    while os.getppid() != 1:
        received = end.receive(PATIENCE_S)
        if received is None:
            continue
        if silent:
            pipe.send_bytes(b"received")
        else:
            answer(end, received)


def attention_process(pipe: Connection, address: str) -> None:
    """Link to the expert, dispatch one parcel, tell, then hold everything until killed."""
    me = identity()
    expert = identity("expert-0").member
    end = ShmAttentionEnd(me, CONFIG)
    end.connect([Peer(expert, address)], PATIENCE_S)
    end.dispatch([parcel(me, expert)])
    pipe.send_bytes(b"dispatched")
    pipe.poll(3 * PATIENCE_S)
