"""Clients that stream all the while, processes that are killed or frozen under them, and what the clients saw.

Each client asks for the same seeded answer again and again, over a connection of its own, so that every token id
and logprob can be compared with those of an answer that nothing disturbed. Between them they use what a replay
could get wrong: seeds, logprobs, stop strings, siblings, penalties, grammars, chat.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import time
import urllib.parse
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import psutil

STUCK_S = 90.0  # without a word: then a stream is stuck
RECONNECT_S = 0.1
LOOK_S = 0.1
SOON_S = 0.3  # a gap that begins within it is of the loss; one that begins later, of what comes after
WHOLE_WITHIN_S = 180.0
_LINE_BYTES_MAX = 1 << 20
_SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[a-f0-9]{16}$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 6, "maxItems": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 10**9},
    },
    "required": ["id", "tags", "size"],
    "additionalProperties": False,
}


def asked(i: int, max_tokens: int) -> tuple[str, dict[str, Any]]:
    """What client i asks for: path and body."""
    every = {
        "max_tokens": max_tokens, "seed": 1000 + i, "temperature": 1.0, "logprobs": 1, "return_token_ids": True,
        "stream": True,
    }  # fmt: skip
    prompt = {"prompt": [20 + (7 * i + j) % 900 for j in range(3 + 5 * (i % 8))]}
    longest = {"ignore_eos": True}
    match i % 6:
        case 0:
            return "/v1/completions", every | prompt | longest
        case 1:  # a stop string of one letter is found after some tokens
            return "/v1/completions", every | prompt | {"top_p": 0.95, "stop": ["qu", "ZZ"], "min_tokens": 24}
        case 2:
            return "/v1/completions", every | prompt | longest | {"n": 2, "top_k": 50}
        case 3:
            held = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}}
            return "/v1/completions", every | prompt | held
        case 4:
            chat = {"messages": [{"role": "user", "content": f"Say something about {i}."}]}
            return "/v1/chat/completions", every | chat | longest | {"logprobs": True, "top_logprobs": 2}
        case _:
            penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
            return "/v1/completions", every | prompt | longest | penalties | {"min_p": 0.01}


class Gap(NamedTuple):
    """Between two tokens of one answer, or from asking to its first."""

    began_s: float  # by time.monotonic
    seconds: float
    client: int
    is_first: bool = False


@dataclass
class Seen:
    """By all clients."""

    answers: int = 0
    tokens: int = 0
    different: list[int] = field(default_factory=list)  # clients
    failed: list[str] = field(default_factory=list)
    reconnected: list[int] = field(default_factory=list)  # clients whose gateway had gone
    gaps: list[Gap] = field(default_factory=list)

    def worst(self, since_s: float = 0.0, until_s: float = math.inf, begins_after_s: float = 0.0) -> Gap:
        """Between two tokens, of those gaps that reach into this time and began after that."""
        within = (
            gap
            for gap in self.gaps
            if not gap.is_first and gap.began_s + gap.seconds > since_s and begins_after_s <= gap.began_s < until_s
        )
        return max(within, key=lambda gap: gap.seconds, default=Gap(since_s, 0.0, -1))

    def longest_first_s(self, since_s: float = 0.0, until_s: float = math.inf) -> float:
        """Wait for a first token, of those who asked in this time."""
        return max(
            (gap.seconds for gap in self.gaps if gap.is_first and since_s <= gap.began_s < until_s), default=0.0
        )

    def percentile_s(self, share: float) -> float:
        """Of all gaps between two tokens."""
        lengths = sorted(gap.seconds for gap in self.gaps if not gap.is_first)
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))] if lengths else 0.0


class Failed(Exception):
    """An answer that was an error."""


class NotReady(OSError):
    """As a gateway says that has just been started."""


class Clients:
    """`calm` of one answer each alone; then `async with clients.streaming() as seen:` all ask again and again."""

    def __init__(
        self, urls: Sequence[str], num_clients: int, max_tokens: int, may_reconnect: Collection[int] = ()
    ) -> None:
        """`urls`: of gateways, in turn; a connection to one of those in `may_reconnect` may break."""
        self._urls, self._max_tokens, self._may_reconnect = urls, max_tokens, may_reconnect
        self._expected: list[list[Any]] = []
        self._heard_s = [0.0] * num_clients
        self._is_over = False

    async def calm(self, rounds: int) -> Seen:
        """Undisturbed, all at once, so often; what the first round brings is what must come from then on."""
        seen, numbers = Seen(), range(len(self._heard_s))
        self._expected = list(await asyncio.gather(*(self._answer(i, Seen()) for i in numbers)))
        for _ in range(rounds):
            await asyncio.gather(*(self._once(i, seen) for i in numbers))
        return seen

    @contextlib.asynccontextmanager
    async def streaming(self) -> AsyncIterator[Seen]:
        """At its end every client finishes the answer in hand."""
        seen, self._is_over = Seen(), False
        async with asyncio.TaskGroup() as clients:
            for i in range(len(self._heard_s)):
                clients.create_task(self._ask(i, seen))
            try:
                yield seen
            finally:
                self._is_over = True

    async def _ask(self, i: int, seen: Seen) -> None:
        while not self._is_over:
            await self._once(i, seen)

    async def _once(self, i: int, seen: Seen) -> None:
        try:
            answer = await self._answer(i, seen)
        except (OSError, asyncio.IncompleteReadError) as error:  # a timeout is an OSError
            if isinstance(error, TimeoutError) or i % len(self._urls) not in self._may_reconnect:
                seen.failed.append(f"client {i}: {type(error).__name__}: {error}")
            seen.reconnected.append(i)
            await asyncio.sleep(RECONNECT_S)
        except Failed as error:
            seen.failed.append(f"client {i}: {error}")
            await asyncio.sleep(RECONNECT_S)
        else:
            seen.answers += 1
            if answer != self._expected[i]:
                seen.different.append(i)

    async def _answer(self, i: int, seen: Seen) -> list[Any]:
        path, body = asked(i, self._max_tokens)
        parts = urllib.parse.urlsplit(self._urls[i % len(self._urls)])
        text = json.dumps(body)
        choices: dict[int, list[Any]] = {}
        heard_s = time.monotonic()
        async with asyncio.timeout(STUCK_S) as limit:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_LINE_BYTES_MAX)
            try:
                writer.write(
                    f"POST {path} HTTP/1.1\r\nHost: {parts.hostname}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}".encode()
                )
                async for event in _events(reader):
                    limit.reschedule(asyncio.get_running_loop().time() + STUCK_S)
                    if any(choice.get("token_ids") for choice in event.get("choices", ())):
                        now_s = time.monotonic()
                        seen.gaps.append(Gap(heard_s, now_s - heard_s, i, is_first=not any(choices.values())))
                        heard_s = now_s
                    for choice in event.get("choices", ()):
                        said = choices.setdefault(choice["index"], [])
                        ids = choice.get("token_ids") or []
                        seen.tokens += len(ids)
                        said += [*zip(ids, _logprobs(choice), strict=True)]
                        if choice["finish_reason"]:
                            said.append(choice["finish_reason"])
            finally:
                writer.close()
        return [choices[index] for index in sorted(choices)]


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Until the stream has said that it is done. Each event lies within one chunk, so lines do."""
    head = await reader.readline()
    if head.split()[1:2] != [b"200"]:
        if not head:
            raise asyncio.IncompleteReadError(b"", None)
        if head.split()[1:2] == [b"503"]:
            raise NotReady(f"{head!r}")
        raise Failed(f"{head!r}: {(await reader.read(1 << 16)).decode(errors='replace')}")
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                raise Failed(str(event["error"]))
            yield event
    raise asyncio.IncompleteReadError(b"", None)


def _logprobs(choice: dict[str, Any]) -> Iterable[float]:
    of_choice = choice.get("logprobs") or {}
    if "content" in of_choice:
        return [entry["logprob"] for entry in of_choice["content"] or ()]
    return of_choice.get("token_logprobs") or []


class Standstill:
    """How long this process itself did not turn: what clients saw then was not the cluster's doing alone."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def watch(self) -> None:
        while True:
            began_s = time.monotonic()
            await asyncio.sleep(LOOK_S / 2)
            self.worst_s = max(self.worst_s, time.monotonic() - began_s - LOOK_S / 2)


@dataclass(frozen=True)
class Incident:
    """What one loss did, in seconds."""

    who: str
    gap_s: float  # worst that reaches into the loss
    later_gap_s: float  # worst of those that began after SOON_S, until all was whole again
    later_at_s: float  # when that began
    first_token_s: float  # longest wait for one, of those who asked meanwhile
    started_s: float  # until its successor was ordered, registered, and all was whole
    registered_s: float
    whole_s: float
    standstill_s: float  # of this process, meanwhile


async def status_of(client: httpx.AsyncClient) -> dict[str, Any] | None:
    """None: the controller, or this gateway, is not there just now."""
    try:
        answer = await client.get("/v1/admin/status")
    except httpx.TransportError:
        return None
    return answer.json() if answer.status_code == 200 else None


def is_whole(status: dict[str, Any]) -> bool:
    """Every worker serves, in the epoch that is published."""
    return status["phase"] == "ready" and all(
        worker["state"] == "ready" and worker["epoch"] == status["epoch"] for worker in status["workers"]
    )


async def until_whole(client: httpx.AsyncClient) -> dict[str, Any]:
    async with asyncio.timeout(WHOLE_WITHIN_S):
        while (status := await status_of(client)) is None or not is_whole(status):
            await asyncio.sleep(LOOK_S)
    return status


async def lose_worker(client: httpx.AsyncClient, seen: Seen, worker: dict[str, Any], number: int) -> Incident:
    """This worker of the status document gets this signal; returns when its successor serves and it is gone."""
    standstill = Standstill()
    watching = asyncio.create_task(standstill.watch())
    since_s = time.monotonic()
    os.kill(worker["pid"], number)
    reached: dict[str, float] = {}
    async with asyncio.timeout(WHOLE_WITHIN_S):
        while True:
            status = await status_of(client)
            workers = status["workers"] if status else []
            [now] = [one for one in workers if one["id"] == worker["id"]] or [worker]
            if now["incarnation"] > worker["incarnation"]:
                reached.setdefault("started", time.monotonic() - since_s)
                if now["state"] != "starting":
                    reached.setdefault("registered", time.monotonic() - since_s)
                if status is not None and is_whole(status):
                    break
            await asyncio.sleep(LOOK_S)
    whole_s = time.monotonic() - since_s
    assert not psutil.pid_exists(worker["pid"]), f"{worker['id']} lives on beside its successor"
    await asyncio.sleep(1.0)  # gaps are known when they end
    watching.cancel()
    first = seen.worst(since_s, since_s + SOON_S)
    later = seen.worst(since_s, since_s + whole_s, begins_after_s=since_s + SOON_S)
    return Incident(
        who=f"{worker['id']} {signal.Signals(number).name}",
        gap_s=first.seconds,
        later_gap_s=later.seconds,
        later_at_s=later.began_s - since_s,
        first_token_s=seen.longest_first_s(since_s, since_s + whole_s),
        started_s=reached["started"],
        registered_s=reached["registered"],
        whole_s=whole_s,
        standstill_s=standstill.worst_s,
    )
