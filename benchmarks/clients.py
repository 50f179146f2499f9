"""A client that streams and keeps the times: one completion over one connection, as little work as it can be.

It shares the cores with the server that it measures, so it reads lines and counts tokens, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field

import orjson

_LINE_BYTES_MAX = 1 << 20


@dataclass
class Answer:
    sent_s: float
    status: int = 0  # 0: no answer
    retry_after_s: float | None = None
    error: str = ""
    arrivals_s: list[float] = field(default_factory=list)  # of events with tokens, by the clock of `sent_s`
    num_tokens: int = 0
    num_cached: int = 0  # prompt tokens that were not computed
    is_done: bool = False  # the stream came to its end

    @property
    def is_refused(self) -> bool:
        """Refused for load, and told when to come again."""
        return self.status == 429 and self.retry_after_s is not None

    @property
    def first_token_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


class Client:
    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        """`timeout_s`: from sending to the last token; longer is a failure."""
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._timeout_s = timeout_s

    async def complete(self, prompt: Sequence[int], max_tokens: int, answer: Answer | None = None) -> Answer:
        """All `max_tokens` are generated. `answer`: filled while it lasts, for who watches."""
        answer = answer or Answer(0.0)
        body = {
            "prompt": list(prompt), "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True,
        }  # fmt: skip
        answer.sent_s = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange("POST", "/v1/completions", json.dumps(body), answer)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:  # a timeout is an OSError
            answer.error = f"{type(error).__name__}: {error}"
        return answer

    async def _exchange(self, verb: str, path: str, body: str, answer: Answer) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_LINE_BYTES_MAX)
        try:
            writer.write(
                f"{verb} {path} HTTP/1.1\r\nHost: {self._host}\r\n{self._key}Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
            )
            answer.status = int((await reader.readline()).split()[1])
            while line := (await reader.readline()).strip():
                name, _, value = line.partition(b":")
                if name.lower() == b"retry-after":
                    answer.retry_after_s = float(value)
            if answer.status == 200:
                await _read_stream(reader, answer)
            else:
                answer.error = (await reader.read(_LINE_BYTES_MAX)).decode(errors="replace")
        finally:
            writer.close()


async def _read_stream(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Server-sent events: each lies within one chunk, so lines can be read without looking at the chunks."""
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            answer.is_done = not answer.error
            return
        event = orjson.loads(line[6:])
        if "error" in event:
            answer.error = str(event["error"])
        elif event.get("usage"):
            answer.num_cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        num_tokens = sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))
        if num_tokens:
            answer.arrivals_s.append(time.monotonic())
            answer.num_tokens += num_tokens
