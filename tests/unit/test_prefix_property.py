"""A sequence reads the keys of its own tokens, whatever happens: the book against a pool of facts."""

import zlib
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from attention_workers.kv_blocks import blocks_overlapped
from attention_workers.step import AttemptId, FinishReason, StepResult, TokenDelta
from tests.unit.test_book import plan
from tests.unit.test_prefix_cache import T, book, prompt_of

FAMILY = [[*range(10, 50)], [*range(10, 26), *range(60, 90)], [*range(10, 34), *range(300, 320)], [7] * 30]

EVENTS = st.lists(
    st.one_of(
        st.just(("step",)),
        st.tuples(
            st.just("start"), st.integers(0, 3), st.integers(1, 40), st.integers(1, 20), st.integers(0, 1),
            st.sampled_from(["", "", "salt"]), st.integers(1, 3),
        ),
        st.tuples(st.just("stop"), st.integers(0, 9)),
        st.tuples(st.just("fail"), st.integers(0, 9)),
        st.tuples(st.just("limits"), st.integers(1, 40), st.integers(1, 30)),
    ),
    min_size=10,
    max_size=50,
)  # fmt: skip


def told(s, end):
    """What the keys of a sequence's first `end` positions are of: all tokens up to each."""
    return [(s.root, *s.tokens[: p + 1]) for p in range(end)]


def answer(tokens):
    return 100 + zlib.crc32(bytes(t % 256 for t in tokens)) % 50


class Worker:
    """Runs a book as the real one does, with facts for tensors."""

    def __init__(self, b):
        self.book = b
        self.held = {kind: [[None] * T for _ in range(space.total)] for kind, space in b.spaces.items()}
        self.ends, self.answers = {}, {}

    def _compute(self, spans):
        """As the model: writes its spans' keys, then reads all that each of their tokens sees."""
        for span in spans:
            s, end = span.sequence, span.first + span.count
            for kind, table in s.tables.items():
                for p in range(span.first, end):
                    self.held[kind][table.blocks[p // T - table.first]][p % T] = told(s, end)[p]
        for span in spans:
            s, end = span.sequence, span.first + span.count
            for kind, table in s.tables.items():
                for p in range(self.book.spaces[kind].first_seen(span.first), end):
                    assert self.held[kind][table.blocks[p // T - table.first]][p % T] == told(s, end)[p]

    def step(self, result):
        b = self.book
        spans = b.compose(result)
        b.check()
        self._compute(spans)
        b.computed(spans, result)
        b.check()
        for s in [span.sequence for span in spans if span.samples]:
            token = answer(s.tokens)
            b.sampled(s, token, TokenDelta(s.start.attempt, s.num_generated, (token,)), result)
        b.check()
        for delta in result.deltas.get("gw", []):
            got = self.answers.setdefault(delta.attempt, [])
            assert delta.position == len(got)
            got += delta.tokens
        for end in result.completions:
            assert end.attempt not in self.ends
            self.ends[end.attempt] = end.reason
        assert spans or result.paused or not b.sequences


@given(EVENTS, st.integers(4, 24), st.integers(1, 14), st.integers(0, 8), st.booleans())
def test_whatever_happens_a_sequence_reads_its_own_keys(events, full, window, spare, is_hybrid):
    """Shared prefixes, siblings, pauses, evictions, failures: every key that a token sees is that of its own
    tokens, each block is accounted for after every event, and each sequence has the answer it had alone."""
    b = book(full, blocks_overlapped(window, T) + spare, window if is_hybrid else None, model_len_max=64)
    worker, asked, arrivals = Worker(b), {}, 0
    limits = {"step_tokens_max": 16, "chunk_tokens_max": 8}
    for kind, *args in [*events, ("step",)]:
        result, starts, stops = StepResult(), [], []
        if kind == "start":
            member, length, max_tokens, priority, salt, n = args
            name = f"r{arrivals}"
            one = prompt_of(FAMILY[member][:length], name, max_tokens, salt, priority=priority, arrival=arrivals)
            starts = [replace(one, attempt=AttemptId(name, i, 1)) for i in range(n)]
            asked |= {s.attempt: s for s in starts}
            arrivals += 1
        elif kind == "stop":
            stops = sorted(b.sequences)[args[0] : args[0] + 1]
        elif kind == "limits":
            limits = {"step_tokens_max": args[0], "chunk_tokens_max": args[1]}
        elif kind == "fail":
            for attempt in sorted(b.sequences)[args[0] : args[0] + 1]:
                b.fail(b.sequences[attempt], "not finite", result)
        if kind in ("start", "stop", "limits"):
            b.apply(plan(b.plan_number + 1, starts, stops, **limits), result)
        b.check()
        worker.step(result)
    for _ in range(3000):
        if not b.sequences:
            break
        worker.step(StepResult())
    assert worker.ends.keys() == asked.keys()
    assert all(space.num_available == space.total for space in b.spaces.values())
    for attempt, s in asked.items():
        if worker.ends[attempt] is FinishReason.LENGTH:
            alone = list(s.prompt)
            for _ in range(min(s.max_tokens, max(1, min(64, full * T) - len(s.prompt)))):
                alone.append(answer(alone))
            assert worker.answers[attempt] == alone[len(s.prompt) :]
