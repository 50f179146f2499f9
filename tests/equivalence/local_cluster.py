"""Attention and expert workers of one checkpoint in this process, over any exchange. No Ray.

The same plain classes that actors host. Expert workers answer from threads of their own.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field

import torch

from attention_workers.attention_model import AttentionModel
from attention_workers.book import Book
from attention_workers.guides import Guides
from attention_workers.kv_blocks import KvBlocks
from attention_workers.step import AttemptId, Plan, Sampling, Start, StepResult
from attention_workers.worker import AttentionWorker
from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.worker import ExpertWorker
from model.attention import TILE
from model.device import HOST
from model.layer_types import FULL, SLIDING
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.placement import EpochId, Member, Placement, spread
from router.transport.base import LinkIdentity
from router.transport.local import LocalHub
from router.transport.select import attention_end, expert_end

EPOCH = EpochId(1, 1)
UNHURRIED_S = 60.0  # between two tokens: no step is cut short for it


def request(name, prompt, *, max_tokens=12, temperature=0.0, top_k=0, top_p=1.0, seed=0, num_logprobs=3, arrival=0,
            accepted=(), number=1):  # fmt: skip
    sampling = Sampling(temperature, top_p, top_k, seed)
    attempt = AttemptId(name, 0, number)
    return Start(
        attempt, "gw", tuple(prompt), tuple(accepted), sampling, frozenset(), max_tokens, num_logprobs, 0, arrival
    )


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    scores: list = field(default_factory=list)  # of its prompt's tokens


class LocalCluster:
    def __init__(self, checkpoint, *, attention=1, experts=1, replicas=1, microbatches=1, blocks=96,
                 sliding_blocks=96, model_len=1024, dtype=None, numerics="exact", placement=None,
                 keep=("dequantised",), transport="local", device=HOST, rows_on=HOST, prefix_cache=True,
                 join_wait_s=0.0, dies_after=None, router=None):  # fmt: skip
        """`placement(members) -> Placement` replaces the even spread; `sliding_blocks`: of a hybrid.

        `keep`: how FP8 weights are held, in turn, by expert workers and by attention workers. `transport`: or
        "mixed", where every other expert worker looks as if it were on another host. `rows_on`: what local links
        carry; elsewhere than on `device`, rows are staged. `dies_after`: batches of the first expert worker, which
        then is gone with a parcel in hand.
        """
        self.checkpoint, self.device = checkpoint, device
        config = checkpoint.config
        self.dtype = dtype or getattr(torch, config.dtype)
        self.hub, self.router = LocalHub(rows_on), router or RouterConfig(combine_timeout_s=30.0)
        self._encoding = self.router.rows_sent(numerics), self.router.answers(numerics)
        self._transport = "auto" if transport == "mixed" else transport
        self._stopping = threading.Event()
        self._join_wait_s, self._retired = join_wait_s, None
        self.experts = [self._expert(Member(f"e{i}", 1), numerics) for i in range(experts)]
        members = [(e.residency.member, e.end.address) for e in self.experts]
        if transport == "mixed":
            members[::2] = [(member, address.split(",")[1]) for member, address in members[::2]]
        self.placement: Placement = (placement or self._spread)(members, replicas)
        self._keep = keep
        self.prepare(self.placement)
        self._threads = [
            threading.Thread(
                target=self._answer, args=(e, dies_after if e is self.experts[0] else None), daemon=True
            )
            for e in self.experts
        ]
        for thread in self._threads:
            thread.start()
        self._model_len, self._prefix_cache = model_len, prefix_cache
        self.guides = Guides(checkpoint.path / "tokenizer.json", config.vocab_size, lambda: None)
        pools = {FULL: blocks, SLIDING: sliding_blocks}
        self.workers = [
            self._attention(i, microbatches, pools, numerics, keep[i % len(keep)]) for i in range(attention)
        ]
        self._plans = [0] * attention
        assert config.max_position_embeddings >= 128

    def _spread(self, members, replicas):
        config = self.checkpoint.config
        return spread(EPOCH, self.checkpoint.fingerprint, members, config.num_layers, config.num_experts, replicas)

    def _identity(self, member):
        return LinkIdentity(
            member,
            self.checkpoint.fingerprint,
            "token",
            self.checkpoint.config.hidden_size,
            self.dtype,
            *self._encoding,
        )

    def _expert(self, member, numerics):
        residency = Residency(self.checkpoint, member, self.dtype, numerics, self.device)
        end = expert_end(self._transport, self._identity(member), self.router, self.hub)
        return ExpertWorker(residency, end, ExpertConfig(join_wait_s=self._join_wait_s), self._encoding[0])

    def _attention(self, index, microbatches, pools, numerics, keep):
        model = AttentionModel(
            self.checkpoint,
            device=self.device,
            dtype=self.dtype,
            numerics=numerics,
            positions_max=self._model_len,
            progress=lambda *_: None,
            keep=keep,
        )
        model.make_kv(pools)
        window = self.checkpoint.config.sliding_window
        sliding = None if window is None else KvBlocks(pools[SLIDING], window)
        book = Book(
            self.checkpoint.fingerprint, 1, KvBlocks(pools[FULL]), TILE, 256, self._model_len, sliding=sliding,
            prefix_cache=self._prefix_cache, guide_of=self.guides.open,
        )  # fmt: skip
        member = Member(f"a{index}", 1)
        end = attention_end(self._transport, self._identity(member), self.router, self.hub)
        dispatcher = Dispatcher(end, member, self.router, lambda peer: None, *self._encoding)
        dispatcher.prepare(self.placement)
        dispatcher.adopt()
        return AttentionWorker(model, book, dispatcher, microbatches)

    def prepare(self, placement):
        """Expert workers load what it gives them."""
        for expert, how in zip(self.experts, itertools.cycle(self._keep), strict=False):
            expert.residency.prepare(placement, keep=how)

    def retire(self, epoch):
        """Every attention worker has left it: expert workers free, between turns, what it alone used."""
        self._retired = epoch

    def _answer(self, expert, dies_after):
        torch.set_num_threads(torch.get_num_threads())
        retired = None
        while not self._stopping.is_set():
            if dies_after is not None and expert.batches >= dies_after:
                if expert.end.receive(0.5) is not None:
                    expert.end.close()
                    return
            else:
                expert.turn(0.5)
            if retired != self._retired:
                retired = self._retired
                expert.residency.retire(retired)

    def order(self, worker, starts=(), stops=(), step_tokens=512, chunk_tokens=256):
        """Send the worker its next plan. It allows any time between tokens, so that how prompts are cut does not
        depend on how fast this machine is."""
        self._plans[worker] += 1
        result = StepResult()
        fingerprint = self.checkpoint.fingerprint
        self.workers[worker].book.apply(
            Plan(
                1,
                self._plans[worker],
                fingerprint,
                1,
                tuple(starts),
                tuple(stops),
                step_tokens,
                chunk_tokens,
                inter_token_s=UNHURRIED_S,
            ),
            result,
        )
        return result

    def finish(self, *results):
        """Step all workers until nothing runs; the answers by request."""
        answers: dict[str, Answer] = {}
        results = list(results)
        while any(w.book.sequences for w in self.workers):
            for worker in self.workers:
                worker.step(result := StepResult())
                worker.book.check()
                results.append(result)
        for result in results:
            for delta in result.deltas.get("gw", []):
                answer = answers.setdefault(delta.attempt.request_id, Answer())
                assert delta.position == len(answer.tokens)
                answer.tokens += delta.tokens
                answer.logprobs += delta.logprobs
                assert not (answer.tokens and delta.prompt_logprobs)
                answer.scores += delta.prompt_logprobs
        return answers

    def run(self, starts, worker=0, **limits):
        return self.finish(self.order(worker, starts, **limits))

    def close(self):
        self._stopping.set()
        for expert in self.experts:
            expert.end.wake()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for worker in self.workers:
            assert all(space.num_available == space.total for space in worker.book.spaces.values())
            worker.dispatcher.close()
        self.guides.close(10)
        for expert in self.experts:
            expert.end.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
