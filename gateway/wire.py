"""Between the gateway's values and the messages of expertmesh.v1. What cannot be is MalformedMessage."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, replace

from expertmesh.v1 import identity_pb2, schedule_pb2, step_pb2

from gateway.config import GatewayConfig
from gateway.errors import MalformedMessage, NotReady, Overloaded, Refusal, TooLarge, presentable
from gateway.port import CloseReason, Submission
from gateway.request import FinishReason, Grammar, PromptLogprob, Sampling, TokenDelta


@dataclass(frozen=True)
class Identity:
    """This life of this gateway, the checkpoint it serves, and where workers send its tokens."""

    id: str
    incarnation: int
    fingerprint: str
    token_address: str


_FIELD_BYTES = 16  # tag and length of a field, at most

_FINISH = {
    step_pb2.FINISH_REASON_UNSPECIFIED: None,
    step_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    step_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    step_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    step_pb2.FINISH_REASON_FAILED: FinishReason.FAILED,
}

_CLOSE = {
    schedule_pb2.CLOSE_REASON_WORKER_LOST: CloseReason.WORKER_LOST,
    schedule_pb2.CLOSE_REASON_PREEMPTED: CloseReason.PREEMPTED,
    schedule_pb2.CLOSE_REASON_FAILED: CloseReason.FAILED,
    schedule_pb2.CLOSE_REASON_DEADLINE: CloseReason.DEADLINE,
}


def envelope(sender: Identity, term: int) -> schedule_pb2.GatewayMessage:
    """A message to the scheduler without a body; `term` is the newest seen."""
    return schedule_pb2.GatewayMessage(
        sender=identity_pb2.Incarnation(id=sender.id, number=sender.incarnation),
        fingerprint=sender.fingerprint,
        term=term,
    )


def submit(submission: Submission, bytes_max: int) -> schedule_pb2.Submit:
    """In one message. Raises TooLarge."""
    message = schedule_pb2.Submit(
        request_id=submission.request_id,
        prompt=submission.prompt,
        spec=step_pb2.SequenceSpec(
            sampling=_sampling(submission.sampling),
            stop_token_ids=sorted(submission.stop_token_ids),
            max_tokens=submission.max_tokens,
            num_logprobs=submission.num_logprobs,
            min_tokens=submission.min_tokens,
            cache_salt=submission.cache_salt,
            num_prompt_logprobs=submission.num_prompt_logprobs,
            grammar=None if submission.grammar is None else _grammar(submission.grammar),
        ),
        siblings=[
            schedule_pb2.Sibling(
                index=s.index, attempt=s.attempt, seed=s.seed, accepted=s.accepted, score_from=s.score_from
            )
            for s in submission.siblings
        ],
        priority=submission.priority,
        tenant=submission.tenant,
        resume=submission.resume,
        time_left_s=submission.time_left_s,
        waited_s=submission.waited_s,
    )
    if message.ByteSize() > bytes_max:
        num_tokens = len(submission.prompt) + max(len(sibling.accepted) for sibling in submission.siblings)
        raise TooLarge(
            f"prompt and answer of {num_tokens} tokens take {message.ByteSize()} bytes; a submission to the "
            f"scheduler has at most {bytes_max} (gateway.submit_bytes_max)"
        )
    return message


def submits(submission: Submission, bytes_max: int) -> list[schedule_pb2.Submit]:
    """A resume or claim in as few messages as its siblings fit into. Raises TooLarge when one alone does not."""
    parts: list[schedule_pb2.Submit] = []
    for sibling in submission.siblings:
        alone = submit(replace(submission, siblings=(sibling,)), bytes_max)
        more = alone.siblings[0].ByteSize() + _FIELD_BYTES
        if parts and parts[-1].ByteSize() + more <= bytes_max:
            parts[-1].siblings.append(alone.siblings[0])
        else:
            parts.append(alone)
    return parts


def _sampling(sampling: Sampling) -> step_pb2.Sampling:
    return step_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=[step_pb2.TokenBias(token=token, bias=bias) for token, bias in sampling.logit_bias],
        allowed_token_ids=sampling.allowed_token_ids,
        bad_words=[step_pb2.TokenSequence(tokens=word) for word in sampling.bad_words],
    )


def _grammar(grammar: Grammar) -> step_pb2.Grammar:
    return step_pb2.Grammar(
        text=grammar.text,
        eos=grammar.eos,
        thought_ends=grammar.thought_ends,
        thought_tokens_max=grammar.thought_tokens_max,
        barred=grammar.barred,
    )


def finish(request_id: str, index: int, attempt: int, position: int) -> schedule_pb2.Finish:
    return schedule_pb2.Finish(
        attempt=identity_pb2.Attempt(request_id=request_id, index=index, number=attempt), position=position
    )


def delta(message: step_pb2.TokenDelta) -> TokenDelta:
    """Raises MalformedMessage where the counts do not agree or the finish reason is unknown."""
    tokens, logprobs, flat = tuple(message.tokens), tuple(message.logprobs), message.top_logprobs
    if logprobs and len(logprobs) != len(tokens):
        raise MalformedMessage(f"delta has {len(tokens)} tokens and {len(logprobs)} logprobs")
    if flat and (not tokens or len(flat) % len(tokens)):
        raise MalformedMessage(f"delta has {len(tokens)} tokens and {len(flat)} top_logprobs")
    if message.prompt_logprobs and (tokens or not message.prompt_position):
        raise MalformedMessage(f"delta has {len(tokens)} tokens and logprobs of its prompt, from its first on")
    if message.finish not in _FINISH:
        raise MalformedMessage(f"delta has finish reason {message.finish}")
    width = len(flat) // len(tokens) if flat else 0
    pairs = [(top.token, top.logprob) for top in flat]
    top = tuple(tuple(pairs[i : i + width]) for i in range(0, len(pairs), width or 1))
    at = message.attempt
    return TokenDelta(
        at.request_id,
        at.index,
        at.number,
        message.position,
        tokens,
        logprobs,
        top,
        _FINISH[message.finish],
        message.detail,
        message.num_cached,
        message.prompt_position,
        tuple(
            PromptLogprob(one.logprob, one.rank, tuple((top.token, top.logprob) for top in one.top))
            for one in message.prompt_logprobs
        ),
    )


def close_reason(message: schedule_pb2.AttemptClosed) -> CloseReason:
    """A reason this gateway does not know is one it cannot resume from."""
    return _CLOSE.get(message.reason, CloseReason.FAILED)


def rejection(message: schedule_pb2.Rejected, config: GatewayConfig) -> Refusal:
    """The scheduler's refusal as the client's."""
    why = presentable(message.message)
    retry_after_s = message.retry_after_s or config.retry_after_s
    if message.code == schedule_pb2.REJECT_CODE_OVERLOADED:
        return Overloaded(why, retry_after_s=retry_after_s)
    if message.code == schedule_pb2.REJECT_CODE_TOO_LARGE:
        return TooLarge(why)
    return NotReady(why, retry_after_s=retry_after_s)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that carries a link's token."""
    return (("authorization", f"Bearer {token}"),)


def is_bearer(metadata: Iterable[tuple[str, str | bytes]], token: str) -> bool:
    """Whether a call carries the link's token, compared in constant time."""
    given = next((value for key, value in metadata if key == "authorization"), "")
    given_bytes = given if isinstance(given, bytes) else given.encode()
    return hmac.compare_digest(given_bytes, f"Bearer {token}".encode())
