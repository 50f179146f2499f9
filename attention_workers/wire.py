"""Generated messages to this folder's own, and back. The only place here that knows protobuf."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.v1 import identity_pb2, step_pb2

from attention_workers.book import Book
from attention_workers.step import (
    AttemptId,
    Completion,
    FinishReason,
    Grammar,
    Plan,
    PromptLogprob,
    RunningSequence,
    Sampling,
    Start,
    StepResult,
    TokenDelta,
)
from model.layer_types import FULL, SLIDING
from router.placement import Member


def attempt(message: identity_pb2.Attempt) -> AttemptId:
    return AttemptId(message.request_id, message.index, message.number)


def attempt_pb(attempt_id: AttemptId) -> identity_pb2.Attempt:
    return identity_pb2.Attempt(request_id=attempt_id.request_id, index=attempt_id.index, number=attempt_id.number)


def member_pb(member: Member) -> identity_pb2.Incarnation:
    return identity_pb2.Incarnation(id=member.id, number=member.incarnation)


def start(message: step_pb2.Start) -> Start:
    spec = message.spec
    return Start(
        attempt(message.attempt),
        message.gateway_address,
        tuple(message.prompt),
        tuple(message.accepted),
        sampling(spec.sampling),
        frozenset(spec.stop_token_ids),
        spec.max_tokens,
        spec.num_logprobs if spec.HasField("num_logprobs") else None,
        message.priority,
        message.arrival,
        spec.min_tokens,
        spec.cache_salt,
        spec.num_prompt_logprobs,
        message.score_from,
        message.handle,
        grammar(spec.grammar) if spec.HasField("grammar") else None,
    )


def grammar(message: step_pb2.Grammar) -> Grammar:
    return Grammar(
        message.text,
        tuple(message.eos),
        tuple(message.thought_ends),
        message.thought_tokens_max,
        tuple(message.barred),
    )


def sampling(message: step_pb2.Sampling) -> Sampling:
    return Sampling(
        message.temperature,
        message.top_p,
        message.top_k,
        message.seed,
        message.min_p,
        message.repetition_penalty or 1.0,
        message.frequency_penalty,
        message.presence_penalty,
        tuple((bias.token, bias.bias) for bias in message.logit_bias),
        tuple(message.allowed_token_ids),
        tuple(tuple(word.tokens) for word in message.bad_words),
    )


def plan(message: step_pb2.Plan) -> Plan:
    return Plan(
        message.term,
        message.number,
        message.fingerprint,
        message.to.number,
        tuple(start(s) for s in message.starts),
        tuple(attempt(a) for a in message.stops),
        message.step_tokens_max,
        message.chunk_tokens_max,
        message.send_state,
        message.inter_token_s,
        message.draining,
    )


def running_pb(running: RunningSequence) -> step_pb2.RunningSequence:
    return step_pb2.RunningSequence(
        attempt=attempt_pb(running.attempt),
        num_tokens=running.num_tokens,
        prompt_done=running.prompt_done,
        arrival=running.arrival,
        handle=running.handle,
    )


def state_pb(running: Sequence[RunningSequence]) -> step_pb2.State:
    return step_pb2.State(running=[running_pb(r) for r in running])


def endings_pb(completions: Sequence[Completion]) -> step_pb2.Endings:
    return step_pb2.Endings(
        handles=[c.handle for c in completions],
        reasons=[step_pb2.FinishReason.Name(c.reason) for c in completions],
        num_tokens=[c.num_tokens for c in completions],
        details=[c.detail for c in completions if c.reason is FinishReason.FAILED],
    )


def delta_pb(delta: TokenDelta) -> step_pb2.TokenDelta:
    return step_pb2.TokenDelta(
        attempt=attempt_pb(delta.attempt),
        position=delta.position,
        tokens=delta.tokens,
        logprobs=[p.sampled for p in delta.logprobs],
        top_logprobs=[_top_pb(*pair) for p in delta.logprobs for pair in p.top],
        finish=step_pb2.FinishReason.Name(delta.finish or 0),
        detail=delta.detail,
        num_cached=delta.num_cached,
        prompt_position=delta.prompt_position,
        prompt_logprobs=[_prompt_logprob_pb(p) for p in delta.prompt_logprobs],
    )


def _prompt_logprob_pb(found: PromptLogprob) -> step_pb2.PromptLogprob:
    top = [_top_pb(*pair) for pair in found.top]
    return step_pb2.PromptLogprob(logprob=found.logprob, rank=found.rank, top=top)


def _top_pb(token: int, logprob: float) -> step_pb2.TopLogprob:
    return step_pb2.TopLogprob(token=token, logprob=logprob)


def batch_pb(sender: Member, fingerprint: str, deltas: Sequence[TokenDelta], number: int) -> step_pb2.TokenBatch:
    return step_pb2.TokenBatch(
        sender=member_pb(sender), fingerprint=fingerprint, deltas=[delta_pb(d) for d in deltas], number=number
    )


def report_pb(sender: Member, book: Book, steps: int, tokens: int, experts_missing: bool) -> step_pb2.WorkerReport:
    """Counts only: their size does not depend on what runs."""
    full, sliding = book.spaces[FULL], book.spaces.get(SLIDING)
    return step_pb2.WorkerReport(
        sender=member_pb(sender),
        fingerprint=book.fingerprint,
        term=book.term,
        plan_number=book.plan_number,
        steps=steps,
        tokens=tokens,
        blocks_free=full.num_available,
        blocks_cached=full.num_cached,
        sliding_blocks_free=sliding.num_available if sliding else 0,
        sliding_blocks_cached=sliding.num_cached if sliding else 0,
        num_running=len(book.sequences),
        num_paused=sum(s.is_paused for s in book.sequences.values()),
        refused_orders=book.num_refused,
        experts_missing=experts_missing,
        draining=book.is_draining,
    )


def hello_pb(book: Book) -> step_pb2.WorkerHello:
    sliding = book.spaces.get(SLIDING)
    return step_pb2.WorkerHello(
        block_tokens=book.block_tokens,
        blocks_total=book.spaces[FULL].total,
        sequences_max=book.sequences_max,
        model_len_max=book.model_len_max,
        sliding_blocks_total=sliding.total if sliding else 0,
        sliding_window=(sliding.window or 0) if sliding else 0,
        prefix_cache=book.prefixes.enabled,
    )


def news_pb(
    counts: step_pb2.WorkerReport, result: StepResult, completions: Sequence[Completion]
) -> step_pb2.WorkerReport:
    """The counts with what one step brought about."""
    report = step_pb2.WorkerReport()
    report.CopyFrom(counts)
    report.prompts_done.extend(result.prompts_done)
    report.undelivered.extend(attempt_pb(a) for a in result.undelivered)
    if completions:
        report.endings.CopyFrom(endings_pb(completions))
    report.paused.extend(attempt_pb(a) for a in result.paused)
    report.kept.extend(result.kept)
    report.evicted.extend(result.evicted)
    if result.state is not None:
        report.state.CopyFrom(state_pb(result.state))
    return report
