"""Clients: they ask, read, hang up, and come again when refused for load or when their gateway dies.

They know what the answer must be."""

from __future__ import annotations

import random
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from cluster.sim.arithmetic import STOPS, VOCAB, expected
from cluster.sim.gateways import GatewayShell
from cluster.sim.scenario import Load
from cluster.sim.world import World
from gateway.errors import NotReady, Overloaded, Refusal
from gateway.ledger import Generation
from gateway.request import FinishReason, GenerateRequest, Sampling, TokenDelta, sibling_seed

RETRY_S = 0.5
BEGIN_S = 1.5


@dataclass(frozen=True)
class Ask:
    at_s: float
    prompt: tuple[int, ...]
    seed: int
    n: int
    max_tokens: int
    priority: int
    tenant: str
    hang_up_at: int | None  # tokens of the first choice after which the client hangs up
    stop_at: int | None  # or after which a stop string is found


def asks(rng: random.Random, load: Load) -> list[Ask]:
    stem = tuple(rng.randrange(VOCAB) for _ in range(12))  # some prompts begin alike
    found = []
    for _ in range(load.count):
        own = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 16)))
        chance, early = rng.random(), rng.randint(1, 6)
        found.append(Ask(
            at_s=rng.uniform(BEGIN_S, BEGIN_S + load.over),
            prompt=stem[: rng.choice([0, 0, 8, 12])] + own,
            seed=rng.getrandbits(64),
            n=rng.choice([1, 1, 1, 2]),
            max_tokens=rng.randint(4, 18),
            priority=rng.choice([0, 0, 1]),
            tenant=rng.choice(["", "a", "b"]),
            hang_up_at=early if chance < load.hang_ups else None,
            stop_at=early if load.hang_ups <= chance < 2 * load.hang_ups else None,
        ))  # fmt: skip
    return found


class Client:
    """Its answer is checked as it comes: each position once, in order, and the token that it must be."""

    def __init__(self, name: str, ask: Ask) -> None:
        self.name, self.ask = name, ask
        self.answers = [expected(ask.prompt, sibling_seed(ask.seed, i), ask.max_tokens) for i in range(ask.n)]
        self.tries = 0
        self.is_done = False
        self.worst_gap_s = 0.0
        self._open: set[int] = set()
        self._tokens: list[list[int]] = []
        self._last_s: dict[int, float] = {}

    def begin(self) -> GenerateRequest:
        ask = self.ask
        self.tries += 1
        self._open, self._tokens, self._last_s = set(range(ask.n)), [[] for _ in range(ask.n)], {}
        return GenerateRequest(
            f"{self.name}.{self.tries}", ask.prompt, Sampling(seed=ask.seed), ask.max_tokens, ask.n,
            stop_token_ids=STOPS, priority=ask.priority, tenant=ask.tenant,
        )  # fmt: skip

    def read(self, generation: Generation, choice: int, delta: TokenDelta, now_s: float) -> None:
        tokens, answer = self._tokens[choice], self.answers[choice]
        where = f"{self.name}, choice {choice}"
        assert delta.position == len(tokens), f"{where}: position {delta.position} after {len(tokens)} tokens"
        assert choice in self._open, f"{where}: tokens after its end"
        tokens += delta.tokens
        assert tokens == answer[: len(tokens)], f"{where}: tokens {tokens}, must be {answer[: len(tokens)]}"
        if choice in self._last_s:
            self.worst_gap_s = max(self.worst_gap_s, now_s - self._last_s[choice])
        self._last_s[choice] = now_s
        if delta.finish is not None:
            self._end(choice, delta.finish)
        elif choice == 0 and self.ask.hang_up_at is not None and len(tokens) >= self.ask.hang_up_at:
            generation.close()
            self._open.clear()
        elif choice == 0 and self.ask.stop_at is not None and len(tokens) >= self.ask.stop_at:
            generation.finish(choice, self.ask.stop_at - 1)
            self._open.discard(choice)
        self.is_done = not self._open

    def _end(self, choice: int, reason: FinishReason) -> None:
        tokens, answer = self._tokens[choice], self.answers[choice]
        assert tokens == answer, f"{self.name}, choice {choice}: ended after {len(tokens)} of {len(answer)} tokens"
        is_stop = tokens[-1] in STOPS and len(tokens) < self.ask.max_tokens
        assert reason is FinishReason.STOP or not is_stop, f"{self.name}, choice {choice}: ended as {reason}"
        self._open.discard(choice)


class Call:
    """One try at one gateway."""

    def __init__(self, clients: Clients, client: Client, gateway: GatewayShell) -> None:
        self._clients, self.client, self.gateway = clients, client, gateway
        self._opening: Coroutine[Any, Any, Generation] | None = None
        self._generation: Generation | None = None

    def begin(self) -> None:
        self._opening = self.gateway.ledger.open([self.client.begin()])
        self.look()

    def look(self) -> None:
        """Something may have come."""
        try:
            if self._opening is not None:
                self._opening.send(None)
        except StopIteration as opened:
            self._opening, self._generation = None, opened.value
        except Refusal as refusal:
            self._opening = None
            self._refused(refusal)
        if self._generation is not None and not self.client.is_done:
            self._read(self._generation)

    def _read(self, generation: Generation) -> None:
        try:
            while not self.client.is_done and (ready := generation.take()) is not None:
                self.client.read(generation, *ready, self._clients.world.now_s)
        except Refusal as refusal:
            generation.close()
            self._generation = None
            self._refused(refusal)
        if self.client.is_done:
            self._clients.finished(self)

    def _refused(self, refusal: Refusal) -> None:
        assert isinstance(refusal, Overloaded | NotReady), (
            f"{self.client.name} failed: {type(refusal).__name__}: {refusal.message}"
        )
        self._clients.again(self, refusal.retry_after_s or RETRY_S)

    def forget(self) -> None:
        """Its gateway has died."""
        if self._opening is not None:
            self._opening.close()


class Clients:
    def __init__(self, world: World, load: Load, gateways: list[GatewayShell]) -> None:
        """`gateways`: those alive, kept so by whoever starts them."""
        self.world = world
        self.clients = [Client(f"request-{i}", ask) for i, ask in enumerate(asks(world.rng, load))]
        self._gateways = gateways
        self._calls: dict[GatewayShell, list[Call]] = {}
        for client in self.clients:
            world.at(client.ask.at_s, lambda client=client: self._ask(client))  # type: ignore[misc]

    @property
    def num_open(self) -> int:
        return sum(not client.is_done for client in self.clients)

    def _ask(self, client: Client) -> None:
        if not self._gateways:
            self.world.at(RETRY_S, lambda: self._ask(client))
            return
        gateway = self.world.rng.choice(self._gateways)
        call = Call(self, client, gateway)
        self._calls.setdefault(gateway, []).append(call)
        gateway.process.do(call.begin)

    def look(self, gateway: GatewayShell) -> None:
        for call in list(self._calls.get(gateway, ())):
            call.look()

    def again(self, call: Call, after_s: float) -> None:
        self._calls[call.gateway].remove(call)
        self.world.at(after_s, lambda: self._ask(call.client))

    def finished(self, call: Call) -> None:
        self._calls[call.gateway].remove(call)

    def gateway_died(self, gateway: GatewayShell) -> None:
        for call in self._calls.pop(gateway, []):
            call.forget()
            self.world.at(RETRY_S, lambda call=call: self._ask(call.client))  # type: ignore[misc]
