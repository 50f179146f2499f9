"""Promises of taking an address: a successor waits for it, not for ever."""

import asyncio
import socket

import pytest

from cluster import address
from cluster.scheduler.config import SchedulerConfig
from cluster.scheduler.core import Scheduler
from cluster.scheduler.errors import AddressUnusable
from cluster.scheduler.server import SchedulerServer

NAME = "expertmesh-test-address"


def held() -> socket.socket:
    """The abstract Unix address, taken as by an earlier life."""
    earlier = socket.socket(socket.AF_UNIX)
    earlier.bind(f"\0{NAME}")
    return earlier


def server() -> SchedulerServer:
    return SchedulerServer(Scheduler(SchedulerConfig(), 2, "fp"), "token")


async def test_a_successor_takes_its_address_once_the_earlier_life_has_let_go() -> None:
    successor = server()
    with held():
        taking = asyncio.create_task(
            address.take(lambda: successor.start(f"unix-abstract:{NAME}"), AddressUnusable, 20.0)
        )
        await asyncio.sleep(0)
        assert not taking.done()
    assert await taking == f"unix-abstract:{NAME}"
    await successor.stop()


async def test_an_address_that_stays_taken_is_an_error_after_the_wait() -> None:
    successor = server()
    with held(), pytest.raises(AddressUnusable, match=NAME):
        await address.take(lambda: successor.start(f"unix-abstract:{NAME}"), AddressUnusable, 0.0)
    await successor.stop()
