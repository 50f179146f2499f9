"""What the gateway's tests share: a tiny checkpoint's text side, and an engine behind the scheduler port.

`EchoEngine` is the port's other implementation: it says the prompt again, token by token, then eos. Its tokens
are a function of prompt, seed and position alone, so a resumed sequence can be compared with an undisturbed one.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from expertmesh.v1 import control_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gateway.config import GatewayConfig
from gateway.errors import Refusal
from gateway.http_server import HttpServer
from gateway.ledger import Ledger
from gateway.metrics import GatewayMetrics
from gateway.model_card import ModelCard, read_model_card
from gateway.port import CloseReason, Sibling, Submission
from gateway.request import FinishReason, PromptLogprob, TokenDelta
from gateway.server import create_app
from gateway.state import GatewayState

SPECIAL = ("]~!b[", "]~b]", "[e~[", "]!d~[")
ADDED = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")
CORPUS = ("hello world, the quick brown fox jumps over the lazy dog", "Grüße aus Köln: 日本語 🙂 …")
TEMPLATE = """\
]~!b[{% for message in messages %}
]~b]{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{ message.content }}{% for call in message.tool_calls or [] %}
<{{ call.function.name }} {{ call.function.arguments | tojson(ensure_ascii=False) }}>{% endfor %}[e~[
{% endfor %}
]~b]ai
"""


@functools.cache
def tokenizer_json() -> str:
    """A byte-level BPE with the family's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ADDED])
    return str(tokenizer.to_str())


def write_checkpoint(folder: Path, template: str = TEMPLATE, **generation: Any) -> Path:
    """What the gateway reads of a checkpoint; `generation` is generation_config.json."""
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": None}))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def card_of(folder: Path, context: int = 256) -> ModelCard:
    """Some ids of the model's vocabulary are unknown to the tokenizer, as in released checkpoints."""
    vocab_size = Tokenizer.from_str(tokenizer_json()).get_vocab_size() + 8
    return read_model_card(folder, name="tiny", fingerprint="f00d", vocab_size=vocab_size, context=context)


def said(prompt: tuple[int, ...], temperature: float, seed: int, position: int, eos: int) -> int:
    """The token at a position: the prompt's own, greedy; one of the prompt's, drawn by seed, otherwise."""
    if position == len(prompt):
        return eos
    if temperature == 0:
        return prompt[position % len(prompt)]
    draw = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return prompt[int.from_bytes(draw, "little") % len(prompt)]


def scored(token: int, position: int, count: int) -> PromptLogprob:
    """What is made of a token of the prompt: always the third likeliest."""
    return PromptLogprob(-0.5 * position, 3, tuple((token + 2 - i, -0.1 * i) for i in range(count)))


class EchoEngine:
    """Implements SchedulerPort in the caller's loop: one task per placed sequence, one token a turn."""

    def __init__(self, eos: int = 0, model_len_max: int = 256) -> None:
        self.not_ready = ""
        self.model_len_max = model_len_max
        self.eos = eos
        self.refusal: Refusal | None = None  # the answer to the next submissions
        self.deaths: set[int] = set()  # positions before which a worker is lost, once each
        self.failure_at: int | None = None  # position at which a worker gives up
        self.hold_at: int | None = None  # position at which sequences wait for `go_on`
        self.go_on = asyncio.Event()
        self.accepts = asyncio.Event()  # cleared: submissions wait
        self.accepts.set()
        self.submissions: list[Submission] = []
        self.cancelled: list[str] = []
        self.finished: list[tuple[str, int, int, int]] = []
        self.num_refused = 0  # late tokens of lost workers that the ledger did not want
        self.score_deaths: set[int] = set()  # prompt tokens before whose logprobs a worker is lost, once
        self.scores = True  # False: it says nothing of prompts
        self.cached: dict[int, int] = {}  # by sibling: tokens of the prompt that it says were cached
        self.says: tuple[int, ...] | None = None  # instead of the prompt, then eos
        self.ledger: Ledger | None = None
        self.tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def submit(self, submission: Submission) -> int:
        await self.accepts.wait()
        if self.refusal is not None:
            raise self.refusal
        self.resume(submission)
        return len(self.tasks)

    def resume(self, submission: Submission) -> None:
        self.submissions.append(submission)
        for sibling in submission.siblings:
            task = asyncio.get_running_loop().create_task(self._run(submission, sibling))
            self.tasks[submission.request_id, sibling.index] = task

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        for key in [key for key in self.tasks if key[0] == request_id]:
            self.tasks.pop(key).cancel()

    def finish(self, request_id: str, index: int, attempt: int, position: int) -> None:
        self.finished.append((request_id, index, attempt, position))

    @property
    def num_running(self) -> int:
        return sum(not task.done() for task in self.tasks.values())

    async def _run(self, submission: Submission, sibling: Sibling) -> None:
        ledger, key = self.ledger, (submission.request_id, sibling.index, sibling.attempt)
        assert ledger is not None
        wanted = range(sibling.score_from or len(submission.prompt), len(submission.prompt))
        for position in wanted if self.scores else ():
            await asyncio.sleep(0)
            if position in self.score_deaths:
                self.score_deaths.remove(position)
                ledger.close_attempt(*key, CloseReason.WORKER_LOST, "killed")
                return
            count = submission.num_prompt_logprobs
            score = scored(submission.prompt[position], position, count)
            ledger.deliver(TokenDelta(*key, 0, (), prompt_position=position, prompt_logprobs=(score,)))
        for position in range(len(sibling.accepted), submission.max_tokens):
            await asyncio.sleep(0)
            if self.hold_at is not None and position >= self.hold_at:
                await self.go_on.wait()
            delta = self._delta(submission, sibling, position)
            if position in self.deaths:
                self.deaths.remove(position)
                ledger.close_attempt(*key, CloseReason.WORKER_LOST, "killed")
                self.num_refused += not ledger.deliver(delta)  # it was on its way when the worker died
                return
            if not ledger.deliver(delta) or delta.finish:
                return

    def _delta(self, submission: Submission, sibling: Sibling, position: int) -> TokenDelta:
        key = (submission.request_id, sibling.index, sibling.attempt, position)
        if position == self.failure_at:
            return TokenDelta(*key, (), finish=FinishReason.FAILED, detail="no expert at /srv/x/y.bin\ntrace")
        token = said(submission.prompt, submission.sampling.temperature, sibling.seed, position, self.eos)
        if self.says is not None:
            token = (*self.says, self.eos)[position]
        finish = FinishReason.LENGTH if position + 1 == submission.max_tokens else None
        if token in submission.stop_token_ids:
            finish = FinishReason.STOP
        count = submission.num_logprobs
        logprobs = () if count is None else (-0.25 * (position + 1),)
        top = (tuple((token + i, -0.25 * (position + 1) - i) for i in range(count)),) if count else ()
        num_cached = self.cached.get(sibling.index, 0) if position == 0 else 0
        return TokenDelta(*key, (token,), logprobs, top, finish, num_cached=num_cached)


def state_of(card: ModelCard, **limits: Any) -> tuple[GatewayState, EchoEngine]:
    """A gateway's state with an echo engine for a cluster."""
    config, metrics = GatewayConfig(**limits), GatewayMetrics()
    engine = EchoEngine(min(card.eos, default=0), card.context)
    engine.ledger = ledger = Ledger(engine, config, metrics)

    async def status() -> dict[str, Any]:
        return {"workers": []}

    async def trace(seconds: float) -> control_pb2.TraceReply:
        return control_pb2.TraceReply(traces=[f"{seconds:g} s".encode()], silent=["attention-1"])

    async def resize(asked: control_pb2.ResizeRequest) -> control_pb2.ResizeReply:
        raise AssertionError(f"no controller is here to be asked for {asked}")

    async def rebalance(dry_run: bool) -> dict[str, Any]:
        epoch = None if dry_run else {"term": 1, "number": 2}
        moves = [{"layer": 3, "expert": 5, "to": "expert-1", "from": source} for source in ("expert-0", None)]
        return {
            "epoch": epoch, "moves": moves, "dropped": 1, "bytes": 64, "imbalance_before": 1.5,
            "imbalance_after": 1.25,
        }  # fmt: skip

    state = GatewayState(config, card, engine, ledger, metrics, status, trace, resize, rebalance, "0.1.0")
    return state, engine


async def settled() -> None:
    """Let everything that can run, run."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def serving(card: ModelCard, **limits: Any) -> AsyncIterator[tuple[GatewayState, EchoEngine, str]]:
    """A gateway on a real port of this host; gives its base URL."""
    state, engine = state_of(card, **limits)
    server = HttpServer("127.0.0.1", 0)
    await server.start(create_app(state), state.config, stop_timeout_s=5)
    try:
        yield state, engine, f"http://127.0.0.1:{server.port}"
    finally:
        engine.go_on.set()
        engine.accepts.set()
        await server.stop()


async def until(happened: Callable[[], bool], patience_s: float = 5.0) -> None:
    """Wait, briefly, for what another task brings about."""
    async with asyncio.timeout(patience_s):
        while not happened():
            await asyncio.sleep(0.001)


def attention(name: str, running: int, paused: int, free: int, cached: int) -> dict[str, Any]:
    gauges = {
        "sequences": running,
        "sequences_paused": paused,
        "kv_blocks_total": 100,
        "kv_blocks_free": free,
        "kv_blocks_cached": cached,
        "kv_block_tokens": 32,
    }
    return {"id": name, "role": "attention", "gauges": gauges}


def pool(wanted: int, ready: int, leaving: int = 0) -> dict[str, int]:
    return {"wanted": wanted, "ready": ready, "leaving": leaving}


STATUS_DOCUMENT: dict[str, Any] = {
    "version": "0.1.0",
    "model": "tiny",
    "model_path": "/srv/models/tiny",
    "phase": "ready",
    "controller": {"address": "unix:secret"},
    "epoch": {"term": 1, "number": 4},
    "pools": {"attention": pool(2, 2), "expert": pool(2, 1)},
    "scaling_failed": "",
    "workers": [
        attention("attention-0", 3, 1, 40, 10),
        {"id": "expert-0", "role": "expert", "gauges": {"slots": 8}},
        attention("attention-1", 1, 0, 100, 0),
        {"id": "attention-2", "role": "attention", "gauges": {}},
    ],
    "scheduler": {"gauges": {"waiting": 5, "waiting_tokens": 700}},
}
