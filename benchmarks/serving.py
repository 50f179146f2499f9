"""What a served model promises under load: prompts beside decodes, cached prefixes, three times too much, a trace.

Over REST, as any client. All figures are ratios within one run, taken round by round, or shares: a machine that is
busy with other things is busy for both sides. Prompts are of random tokens, so that nothing is cached by chance.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clients import Answer, Client
from benchmarks.errors import BenchmarkError
from benchmarks.prefix_cache import Request, ideal, read
from benchmarks.samples import Samples, ratio

Tell = Callable[[str], None]

_TOKENS = range(20, 220)  # of which prompts are made: in every vocabulary
_WARM_TOKENS = 8  # that each decoder has before anything is measured
_POLL_S = 0.005
_BESIDE_S = 3.0  # of decoding alone, before and after the long prompt
_TIMEOUT_S = 600.0
_GROWTH_MIN = 1.05  # of the goodput, within _PATIENCE doublings of the clients, to go on
_PATIENCE = 2
_CLIENTS_MAX = 512
OVERLOAD = 3.0
BLOCK_TOKENS = 32  # of the server's prefix cache, and of one block of the trace as it is scaled


@dataclass(frozen=True)
class Effort:
    rounds: int
    decoders: int
    long_tokens: int  # of the prompt that arrives among the decoders
    prefix_tokens: int
    load_prompt: int
    load_answer: int  # tokens of a request of the overload
    step_s: float  # of each step of the ramp
    overload_s: float


# --- a long prompt among decodes -------------------------------------------------------------------


@dataclass(frozen=True)
class Interruption:
    """Median time between two tokens of all decoders while a long prompt is processed, over that of decoding
    alone: the mean of the medians before and after, for it grows with what the decoders have behind them."""

    ratio: Samples
    beside_ms: Samples  # before and after
    during_ms: Samples
    first_token_s: Samples  # of the long prompt


async def interruption(client: Client, effort: Effort, tell: Tell) -> Interruption:
    rng = random.Random(1)
    beside, during, first = [], [], []
    for number in range(effort.rounds):
        watched = [Answer(0.0) for _ in range(effort.decoders)]
        began_s, long = await _interrupted(client, effort, watched, rng)
        done_s = long.arrivals_s[0]
        alone = ((began_s, long.sent_s), (done_s, done_s + _BESIDE_S))
        beside.append(statistics.fmean(_median_gap_s(watched, *times) for times in alone))
        during.append(_median_gap_s(watched, long.sent_s, done_s))
        first.append(long.first_token_s)
        tell(f"long prompt, round {number + 1} of {effort.rounds}: {during[-1] / beside[-1]:.2f}")
    beside_ms, during_ms = ([1e3 * value for value in values] for values in (beside, during))
    return Interruption(ratio(during, beside), Samples.of(beside_ms), Samples.of(during_ms), Samples.of(first))


async def _interrupted(
    client: Client, effort: Effort, watched: Sequence[Answer], rng: random.Random
) -> tuple[float, Answer]:
    """Since when all of `watched` only decoded, and the answer to the long prompt; then they hang up."""
    prompts = [_prompt(rng, 16) for _ in watched]
    async with asyncio.TaskGroup() as group:
        decoders = [
            group.create_task(client.complete(prompt, effort.long_tokens, answer))
            for prompt, answer in zip(prompts, watched, strict=True)
        ]
        await _until(lambda: all(len(a.arrivals_s) > _WARM_TOKENS for a in watched), decoders)
        began_s = time.monotonic()
        await asyncio.sleep(_BESIDE_S)
        long = await client.complete(_prompt(rng, effort.long_tokens), 1)
        await asyncio.sleep(_BESIDE_S)
        await _until(lambda: True, decoders)
        for decoder in decoders:
            decoder.cancel()
    _require(long)
    return began_s, long


def _median_gap_s(answers: Sequence[Answer], from_s: float, to_s: float) -> float:
    """Of gaps that end in the time given."""
    gaps = [
        later - earlier
        for answer in answers
        for earlier, later in zip(answer.arrivals_s, answer.arrivals_s[1:], strict=False)
        if from_s < later <= to_s
    ]
    if not gaps:
        raise BenchmarkError("no decoder had a token while the long prompt was processed: ask for a longer one")
    return statistics.median(gaps)


# --- a shared prefix -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefix:
    """Time to first token of a second request with the same beginning, over that of the first."""

    ratio: Samples
    first_ms: Samples
    second_ms: Samples


async def prefix(client: Client, effort: Effort, tell: Tell) -> Prefix:
    rng = random.Random(2)
    first: list[float] = []
    second: list[float] = []
    for number in range(effort.rounds):
        shared = _prompt(rng, effort.prefix_tokens)
        for times in (first, second):
            answer = await client.complete([*shared, *_prompt(rng, 16)], 2)
            _require(answer)
            times.append(1e3 * answer.first_token_s)
        tell(f"shared prefix, round {number + 1} of {effort.rounds}: {second[-1] / first[-1]:.2f}")
    return Prefix(ratio(second, first), Samples.of(first), Samples.of(second))


# --- three times too much --------------------------------------------------------------------------


@dataclass(frozen=True)
class Ramp:
    """Closed loops: each client sends its next request when the last has ended."""

    clients: int
    requests_per_s: float
    tokens_per_s: float
    first_token_ms: Samples


@dataclass(frozen=True)
class Overload:
    """Requests at even distances, three times as many as can be sustained, whatever becomes of them."""

    ramp: list[Ramp]
    offered_per_s: float
    seconds: float
    num_offered: int
    num_admitted: int
    num_refused: int  # by 429 with Retry-After
    failures: list[str]
    goodput: float  # tokens a second in the time, over the most that the ramp and the loop after it had
    peak_tokens_per_s: float
    first_token_s: Samples  # of the admitted, the wait in the queue included
    gap_ms: Samples
    retry_after_s: Samples | None
    came_back: int  # of the refused, when they were told to
    got_in: int  # of those, at once


async def overload(client: Client, effort: Effort, tell: Tell) -> Overload:
    rng = random.Random(3)
    ramp = [await _closed_loop(client, effort, 1, rng)]
    while len(ramp) <= _PATIENCE or _grows(ramp):
        if ramp[-1].clients >= _CLIENTS_MAX:
            break
        ramp.append(await _closed_loop(client, effort, 2 * ramp[-1].clients, rng))
        tell(f"{ramp[-1].clients} clients: {ramp[-1].requests_per_s:.1f} requests/s")
    best = max(ramp, key=lambda step: step.tokens_per_s)
    offered_per_s = OVERLOAD * best.requests_per_s
    tell(f"offering {offered_per_s:.1f} requests/s for {effort.overload_s:g} s")
    began_s = time.monotonic()
    fresh, back = await _open_loop(client, effort, offered_per_s, rng)
    admitted = [a for a in fresh if a.is_done]
    failures = [a.error or f"status {a.status}" for a in [*fresh, *back] if not (a.is_done or a.is_refused)]
    if not admitted:
        raise BenchmarkError(f"nothing was admitted; the first failure: {(failures or ['none'])[0]}")
    after = await _closed_loop(client, effort, best.clients, rng)
    peak = max(best.tokens_per_s, after.tokens_per_s)
    ended_s = began_s + effort.overload_s
    num_tokens = sum(at <= ended_s for a in [*admitted, *back] for at in a.arrivals_s)
    told = [a.retry_after_s for a in fresh if a.is_refused and a.retry_after_s is not None]
    return Overload(
        [*ramp, after], offered_per_s, effort.overload_s, len(fresh), len(admitted), len(told), failures,
        num_tokens / effort.overload_s / peak, peak, Samples.of([a.first_token_s for a in admitted]),
        Samples.of([1e3 * gap for a in admitted for gap in a.gaps_s] or [0.0]), Samples.of(told) if told else None,
        len(back), sum(a.is_done for a in back),
    )  # fmt: skip


def _grows(ramp: Sequence[Ramp]) -> bool:
    """Whether one of the newest steps brought clearly more than all before them."""
    rates = [step.tokens_per_s for step in ramp]
    return max(rates[-_PATIENCE:]) > _GROWTH_MIN * max(rates[:-_PATIENCE])


async def _closed_loop(client: Client, effort: Effort, clients: int, rng: random.Random) -> Ramp:
    """What comes in the second half of the time is counted; during the first the clients come one by one, as
    all at once would have their prompts computed in it, and only decode in the second. Who is refused comes back
    when told."""
    began_s = time.monotonic()
    middle_s, end_s = began_s + effort.step_s / 2, began_s + effort.step_s
    answers: list[Answer] = []

    async def loop(number: int) -> None:
        await asyncio.sleep(effort.step_s / 2 * number / clients)
        while time.monotonic() < end_s:
            answer = await client.complete(_prompt(rng, effort.load_prompt), effort.load_answer)
            if answer.is_refused:
                await asyncio.sleep(answer.retry_after_s or 0.0)
                continue
            _require(answer)
            answers.append(answer)

    await _all(loop(number) for number in range(clients))
    arrivals = [at for answer in answers for at in answer.arrivals_s if middle_s < at <= end_s]
    ended = [answer for answer in answers if middle_s < answer.arrivals_s[-1] <= end_s]
    rate = len(arrivals) / (end_s - middle_s)
    firsts = [1e3 * answer.first_token_s for answer in ended or answers]
    return Ramp(clients, rate / effort.load_answer, rate, Samples.of(firsts))


async def _open_loop(
    client: Client, effort: Effort, per_s: float, rng: random.Random
) -> tuple[list[Answer], list[Answer]]:
    """All that were sent, and of every tenth that was refused what it got when it came back as told."""
    fresh: list[Answer] = []
    back: list[Answer] = []

    async def one(number: int) -> None:
        prompt = _prompt(rng, effort.load_prompt)
        answer = await client.complete(prompt, effort.load_answer)
        fresh.append(answer)
        if answer.is_refused and number % 10 == 0:
            await asyncio.sleep(answer.retry_after_s or 0.0)
            back.append(await client.complete(prompt, effort.load_answer))

    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(int(per_s * effort.overload_s)):
            await asyncio.sleep(began_s + number / per_s - time.monotonic())
            group.create_task(one(number))
    return fresh, back


# --- a trace ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """The beginning of a trace of real use, its tokens divided by 16, its times stretched."""

    requests: int
    prompt_tokens: int
    stretch: float  # of times
    first_token_s: Samples
    gap_ms: Samples
    cached_share: float  # of prompt tokens
    ideal_share: float  # with a cache without bounds that has every prompt as soon as it has come
    failures: list[str]


async def replay(client: Client, path: Path, requests_max: int, seconds: float, tell: Tell) -> Replay:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:requests_max]]
    requests = [Request(-(-r.num_tokens // _TRACE_SCALE), r.blocks) for r in read(path, requests_max)]
    stretch = 1000 * seconds / max(1, rows[-1]["timestamp"] - rows[0]["timestamp"])  # of milliseconds
    began_s = time.monotonic()
    tell(f"{len(requests)} requests of {path.name} within {seconds:g} s")

    async def one(row: dict[str, Any], request: Request) -> Answer:
        due_s = began_s + (row["timestamp"] - rows[0]["timestamp"]) / 1000 * stretch
        await asyncio.sleep(due_s - time.monotonic())
        return await client.complete(_named(request), max(1, row["output_length"] // _TRACE_SCALE))

    answers = await _all(one(row, request) for row, request in zip(rows, requests, strict=True))
    done = [answer for answer in answers if answer.is_done]
    if not done:
        raise BenchmarkError(f"no request of the trace was answered: {answers[0].error}")
    num_tokens = sum(request.num_tokens for request in requests)
    return Replay(
        len(requests), num_tokens, stretch, Samples.of([a.first_token_s for a in done]),
        Samples.of([1e3 * gap for a in done for gap in a.gaps_s] or [0.0]),
        sum(a.num_cached for a in done) / num_tokens, ideal(requests, BLOCK_TOKENS, BLOCK_TOKENS) / num_tokens,
        [a.error or f"status {a.status}" for a in answers if not a.is_done],
    )  # fmt: skip


_TRACE_SCALE = 16  # 512 tokens of the trace's blocks are then one block of ours


def _named(request: Request) -> list[int]:
    """A block of the trace by the tokens that its name stands for."""
    tokens = [token for block in request.blocks for token in _prompt(random.Random(block), BLOCK_TOKENS)]
    return tokens[: request.num_tokens]


# --- shared ----------------------------------------------------------------------------------------


def _prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return rng.choices(_TOKENS, k=num_tokens)


def _require(answer: Answer) -> None:
    if not answer.is_done:
        raise BenchmarkError(f"a request was not answered: {answer.error or f'status {answer.status}'}")


async def _until(is_so: Callable[[], bool], tasks: Sequence[asyncio.Task[Answer]]) -> None:
    """Raises BenchmarkError when one of the tasks ends before."""
    while not is_so():
        for task in tasks:
            if task.done():
                raise BenchmarkError(
                    f"a decoder ended too early: {task.result().error or 'it had all its tokens'}"
                )
        await asyncio.sleep(_POLL_S)


async def _all(work: Any) -> list[Any]:
    """The first that fails ends all."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
    return [task.result() for task in tasks]


def serving(
    url: str, api_key: str | None, effort: Effort, trace: tuple[Path, int, float] | None, parts: Sequence[str],
    tell: Tell,
) -> dict[str, Any]:  # fmt: skip
    """The parts asked for, by their names. Raises BenchmarkError."""
    client = Client(url, api_key, _TIMEOUT_S)
    ways: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "interruption": lambda: interruption(client, effort, tell),
        "prefix": lambda: prefix(client, effort, tell),
        "overload": lambda: overload(client, effort, tell),
    }
    if trace is not None:
        ways["trace"] = lambda: replay(client, *trace, tell)
    try:
        return {name: asyncio.run(ways[name]()) for name in parts}
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        raise first from group
