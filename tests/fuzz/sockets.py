"""`python -m tests.fuzz.sockets [--cases N] [--seed S]`: both doors of a gateway, over sockets, by many at once.

Half of the cases go to REST, half to gRPC: spoilt bodies and messages to every endpoint, bytes that are neither
HTTP nor HTTP/2, clients that stop in the middle of a request or of an answer. What must hold: no answer of a
server's fault, none that is not documented, and nothing left: no call, task or descriptor, and no growing memory.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
from expertmesh.v1 import control_pb2

from gateway.http_server import HttpServer
from gateway.openapi import ERRORS
from gateway.server import create_app
from tests.fuzz.gateway_bodies import BODIES, MESSAGES, scrambled, spoiled
from tests.unit.gateway_world import card_of, until, write_checkpoint
from tests.unit.grpc_world import Face, facing

CLIENTS = 16
PATIENCE_S = 30.0  # of a client with an answer: longer is a hang
GROWTH_BYTES_MAX = 48 << 20  # of the process, after its first fifth of the cases
_FAULTS = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
)
_STREAM = "/expertmesh.v1.InferenceService/GenerateStream"
_METHODS = {**MESSAGES, _STREAM: MESSAGES["/expertmesh.v1.InferenceService/Generate"]}


@dataclass
class Gateway:
    face: Face
    http_port: int
    answered: Counter[str] = field(default_factory=Counter)


@asynccontextmanager
async def gateway(folder: Path) -> AsyncIterator[Gateway]:
    """REST and gRPC of one gateway, whose controller agrees to everything."""
    async with facing(card_of(write_checkpoint(folder)), client_stall_s_max=0.5) as face:

        async def status() -> dict[str, Any]:
            return {"workers": [], "pools": {}}

        async def resize(_asked: control_pb2.ResizeRequest) -> control_pb2.ResizeReply:
            return control_pb2.ResizeReply(json='{"workers": [], "pools": {}}')

        face.state.status, face.state.resize = status, resize
        server = HttpServer("127.0.0.1", 0)
        await server.start(create_app(face.state), face.state.config, stop_timeout_s=1)
        try:
            yield Gateway(face, server.port)
        finally:
            await server.stop()


# REST.


async def rest_case(to: Gateway, chance: random.Random) -> None:
    path = chance.choice(list(BODIES))
    body = spoiled(chance.choice(BODIES[path]), chance)
    kind = chance.choice(("application/json",) * 12 + ("text/plain", "", "application/json; charset=é"))
    length = chance.choice((len(body),) * 20 + (0, -1, 10**12, len(body) + 3, max(0, len(body) - 3)))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n"
    words = f"{head}connection: close\r\n\r\n".encode("latin-1") + body
    manner = chance.random()
    if manner < 0.05:
        words = scrambled(words, chance)
    elif manner < 0.08:
        words = chance.randbytes(chance.randrange(2000))
    reader, writer = await asyncio.open_connection("127.0.0.1", to.http_port)
    try:
        writer.write(words)
        if 0.08 < manner < 0.12:  # hangs up with its request half said or its answer half read
            await reader.read(chance.choice((0, 1, 200)))
            return
        answer = await reader.read()
    except ConnectionError:  # who sends what is refused at once may be cut off while it still speaks
        to.answered["cut off"] += 1
        return
    finally:
        writer.close()
    _judge_http(to, answer)


def _judge_http(to: Gateway, answer: bytes) -> None:
    """Everything that was said back is an answer of ours."""
    if not answer:
        to.answered["closed"] += 1
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if told := re.search(rb"\r\ncontent-length: (\d+)", head):
        if behind := body[int(told[1]) :]:
            _judge_http(to, behind)  # a request that was said twice
        body = body[: int(told[1])]
    to.answered[f"HTTP {status}"] += 1
    assert status < 500, answer[:2000]
    assert status == 200 or status in ERRORS or status == 405, answer[:2000]
    if status != 200 and b"chunked" not in head:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, answer[:2000]
    assert b"Traceback" not in answer


# gRPC.


async def grpc_case(to: Gateway, chance: random.Random) -> None:
    method = chance.choice(list(_METHODS))
    words = chance.choice(_METHODS[method]).SerializeToString()
    if chance.random() < 0.8:
        words = scrambled(words, chance)
    manner = chance.random()
    if manner < 0.02:
        await _no_http2(to, chance)
        return
    timeout = chance.choice((None, None, None, 0.0005, 0.01)) if manner < 0.1 else None
    channel = to.face.channel
    call: Any = (channel.unary_stream if method == _STREAM else channel.unary_unary)(method)(
        words, timeout=timeout
    )
    try:
        if manner > 0.95:
            await asyncio.sleep(0)
            call.cancel()
        if method == _STREAM:
            async for _ in call:
                continue
        else:
            await call
        to.answered["gRPC OK"] += 1
        return
    except asyncio.CancelledError:
        if manner <= 0.95:
            raise
        to.answered["gRPC cancelled"] += 1
        return
    except grpc.aio.AioRpcError as error:
        code, told = error.code().name, error.details() or ""
    to.answered[f"gRPC {code}"] += 1
    is_early = told == "no placement is published yet"
    assert code not in _FAULTS or is_early, (method, words, code, told)
    assert "Traceback" not in told


async def _no_http2(to: Gateway, chance: random.Random) -> None:
    words = chance.choice((b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""))
    reader, writer = await asyncio.open_connection("127.0.0.1", to.face.server.port)
    writer.write(words + chance.randbytes(chance.randrange(500)))
    writer.close()
    to.answered["no HTTP/2"] += 1
    del reader


# All of it.


async def run(cases: int, number: int) -> Counter[str]:
    """Raises what was found."""
    chance, own = random.Random(number), psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            to = await stack.enter_async_context(gateway(Path(folder)))
            await _send(to, min(cases, 64), chance)  # what is opened once is no case's
            await _settled(to)
            files = own.num_fds()
            await _send(to, cases // 5, chance)
            gc.collect()
            begun_bytes = own.memory_info().rss
            await _send(to, cases - cases // 5, chance)
            await _settled(to)
            grown = own.memory_info().rss - begun_bytes
            assert own.num_fds() <= files + 4, f"{own.num_fds() - files} descriptors are left"
            assert grown <= GROWTH_BYTES_MAX, f"{grown >> 20} MB are left"
            to.answered["MB grown"] = max(0, grown >> 20)
            return to.answered


async def _send(to: Gateway, cases: int, chance: random.Random) -> None:
    """Each case from a seed of its own, so that one can be sent again alone."""
    seeds = iter([chance.randrange(2**63) for _ in range(cases)])

    async def client() -> None:
        for seed in seeds:
            own = random.Random(seed)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await (rest_case if seed % 2 else grpc_case)(to, own)
            except Exception as error:
                error.add_note(f"case of seed {seed}")
                raise

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())


async def _settled(to: Gateway) -> None:
    """Every connection was noticed to be gone, and no call of it is left."""
    state, tasks = to.face.state, asyncio.all_tasks
    await until(lambda: to.face.is_idle and state.intake.num_bytes == 0, PATIENCE_S)
    await until(lambda: not [task for task in tasks() if "http" in task.get_name() and task.done()], PATIENCE_S)
    gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else it tells of each request that is none
    answered = asyncio.run(run(arguments.cases, arguments.seed))
    told = ", ".join(f"{name} {count}" for name, count in sorted(answered.items()))
    print(f"sockets: {arguments.cases} cases from seed {arguments.seed}: {told}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
