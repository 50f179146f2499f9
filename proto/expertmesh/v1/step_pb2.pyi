from expertmesh.v1 import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_FAILED: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_FAILED: FinishReason

class TokenBias(_message.Message):
    __slots__ = ("token", "bias")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token: int
    bias: float
    def __init__(self, token: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "allowed_token_ids", "bad_words")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[TokenBias]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[TokenBias, _Mapping]]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("text", "eos", "thought_ends", "thought_tokens_max", "barred")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    EOS_FIELD_NUMBER: _ClassVar[int]
    THOUGHT_ENDS_FIELD_NUMBER: _ClassVar[int]
    THOUGHT_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    BARRED_FIELD_NUMBER: _ClassVar[int]
    text: str
    eos: _containers.RepeatedScalarFieldContainer[int]
    thought_ends: _containers.RepeatedScalarFieldContainer[int]
    thought_tokens_max: int
    barred: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., eos: _Optional[_Iterable[int]] = ..., thought_ends: _Optional[_Iterable[int]] = ..., thought_tokens_max: _Optional[int] = ..., barred: _Optional[_Iterable[int]] = ...) -> None: ...

class SequenceSpec(_message.Message):
    __slots__ = ("sampling", "stop_token_ids", "max_tokens", "num_logprobs", "min_tokens", "cache_salt", "num_prompt_logprobs", "grammar")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    sampling: Sampling
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    num_logprobs: int
    min_tokens: int
    cache_salt: str
    num_prompt_logprobs: int
    grammar: Grammar
    def __init__(self, sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., num_logprobs: _Optional[int] = ..., min_tokens: _Optional[int] = ..., cache_salt: _Optional[str] = ..., num_prompt_logprobs: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("attempt", "gateway_address", "prompt", "accepted", "spec", "priority", "arrival", "score_from", "handle")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FROM_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    attempt: _identity_pb2.Attempt
    gateway_address: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    accepted: _containers.RepeatedScalarFieldContainer[int]
    spec: SequenceSpec
    priority: int
    arrival: int
    score_from: int
    handle: int
    def __init__(self, attempt: _Optional[_Union[_identity_pb2.Attempt, _Mapping]] = ..., gateway_address: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., accepted: _Optional[_Iterable[int]] = ..., spec: _Optional[_Union[SequenceSpec, _Mapping]] = ..., priority: _Optional[int] = ..., arrival: _Optional[int] = ..., score_from: _Optional[int] = ..., handle: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("term", "number", "to", "fingerprint", "starts", "stops", "step_tokens_max", "chunk_tokens_max", "send_state", "inter_token_s", "draining")
    TERM_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    STOPS_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    SEND_STATE_FIELD_NUMBER: _ClassVar[int]
    INTER_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    term: int
    number: int
    to: _identity_pb2.Incarnation
    fingerprint: str
    starts: _containers.RepeatedCompositeFieldContainer[Start]
    stops: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Attempt]
    step_tokens_max: int
    chunk_tokens_max: int
    send_state: bool
    inter_token_s: float
    draining: bool
    def __init__(self, term: _Optional[int] = ..., number: _Optional[int] = ..., to: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., fingerprint: _Optional[str] = ..., starts: _Optional[_Iterable[_Union[Start, _Mapping]]] = ..., stops: _Optional[_Iterable[_Union[_identity_pb2.Attempt, _Mapping]]] = ..., step_tokens_max: _Optional[int] = ..., chunk_tokens_max: _Optional[int] = ..., send_state: _Optional[bool] = ..., inter_token_s: _Optional[float] = ..., draining: _Optional[bool] = ...) -> None: ...

class Endings(_message.Message):
    __slots__ = ("handles", "reasons", "num_tokens", "details")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    reasons: _containers.RepeatedScalarFieldContainer[FinishReason]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    details: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, handles: _Optional[_Iterable[int]] = ..., reasons: _Optional[_Iterable[_Union[FinishReason, str]]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., details: _Optional[_Iterable[str]] = ...) -> None: ...

class RunningSequence(_message.Message):
    __slots__ = ("attempt", "num_tokens", "prompt_done", "arrival", "handle")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_DONE_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    attempt: _identity_pb2.Attempt
    num_tokens: int
    prompt_done: bool
    arrival: int
    handle: int
    def __init__(self, attempt: _Optional[_Union[_identity_pb2.Attempt, _Mapping]] = ..., num_tokens: _Optional[int] = ..., prompt_done: _Optional[bool] = ..., arrival: _Optional[int] = ..., handle: _Optional[int] = ...) -> None: ...

class State(_message.Message):
    __slots__ = ("running",)
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    running: _containers.RepeatedCompositeFieldContainer[RunningSequence]
    def __init__(self, running: _Optional[_Iterable[_Union[RunningSequence, _Mapping]]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("block_tokens", "blocks_total", "sequences_max", "model_len_max", "sliding_blocks_total", "sliding_window", "prefix_cache")
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_MAX_FIELD_NUMBER: _ClassVar[int]
    MODEL_LEN_MAX_FIELD_NUMBER: _ClassVar[int]
    SLIDING_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SLIDING_WINDOW_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    block_tokens: int
    blocks_total: int
    sequences_max: int
    model_len_max: int
    sliding_blocks_total: int
    sliding_window: int
    prefix_cache: bool
    def __init__(self, block_tokens: _Optional[int] = ..., blocks_total: _Optional[int] = ..., sequences_max: _Optional[int] = ..., model_len_max: _Optional[int] = ..., sliding_blocks_total: _Optional[int] = ..., sliding_window: _Optional[int] = ..., prefix_cache: _Optional[bool] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("sender", "fingerprint", "term", "plan_number", "steps", "tokens", "blocks_free", "num_running", "num_paused", "prompts_done", "undelivered", "endings", "state", "hello", "refused_orders", "experts_missing", "sliding_blocks_free", "blocks_cached", "sliding_blocks_cached", "kept", "evicted", "draining", "paused")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    PLAN_NUMBER_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_PAUSED_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_DONE_FIELD_NUMBER: _ClassVar[int]
    UNDELIVERED_FIELD_NUMBER: _ClassVar[int]
    ENDINGS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REFUSED_ORDERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_MISSING_FIELD_NUMBER: _ClassVar[int]
    SLIDING_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    SLIDING_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    sender: _identity_pb2.Incarnation
    fingerprint: str
    term: int
    plan_number: int
    steps: int
    tokens: int
    blocks_free: int
    num_running: int
    num_paused: int
    prompts_done: _containers.RepeatedScalarFieldContainer[int]
    undelivered: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Attempt]
    endings: Endings
    state: State
    hello: WorkerHello
    refused_orders: int
    experts_missing: bool
    sliding_blocks_free: int
    blocks_cached: int
    sliding_blocks_cached: int
    kept: _containers.RepeatedScalarFieldContainer[int]
    evicted: _containers.RepeatedScalarFieldContainer[int]
    draining: bool
    paused: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Attempt]
    def __init__(self, sender: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., fingerprint: _Optional[str] = ..., term: _Optional[int] = ..., plan_number: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., blocks_free: _Optional[int] = ..., num_running: _Optional[int] = ..., num_paused: _Optional[int] = ..., prompts_done: _Optional[_Iterable[int]] = ..., undelivered: _Optional[_Iterable[_Union[_identity_pb2.Attempt, _Mapping]]] = ..., endings: _Optional[_Union[Endings, _Mapping]] = ..., state: _Optional[_Union[State, _Mapping]] = ..., hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., refused_orders: _Optional[int] = ..., experts_missing: _Optional[bool] = ..., sliding_blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., sliding_blocks_cached: _Optional[int] = ..., kept: _Optional[_Iterable[int]] = ..., evicted: _Optional[_Iterable[int]] = ..., draining: _Optional[bool] = ..., paused: _Optional[_Iterable[_Union[_identity_pb2.Attempt, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token", "logprob")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token: int
    logprob: float
    def __init__(self, token: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class PromptLogprob(_message.Message):
    __slots__ = ("logprob", "rank", "top")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TokenDelta(_message.Message):
    __slots__ = ("attempt", "position", "tokens", "logprobs", "top_logprobs", "finish", "detail", "num_cached", "prompt_position", "prompt_logprobs")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_POSITION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    attempt: _identity_pb2.Attempt
    position: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    finish: FinishReason
    detail: str
    num_cached: int
    prompt_position: int
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PromptLogprob]
    def __init__(self, attempt: _Optional[_Union[_identity_pb2.Attempt, _Mapping]] = ..., position: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_logprobs: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., detail: _Optional[str] = ..., num_cached: _Optional[int] = ..., prompt_position: _Optional[int] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PromptLogprob, _Mapping]]] = ...) -> None: ...

class TokenBatch(_message.Message):
    __slots__ = ("sender", "fingerprint", "deltas", "number")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    sender: _identity_pb2.Incarnation
    fingerprint: str
    deltas: _containers.RepeatedCompositeFieldContainer[TokenDelta]
    number: int
    def __init__(self, sender: _Optional[_Union[_identity_pb2.Incarnation, _Mapping]] = ..., fingerprint: _Optional[str] = ..., deltas: _Optional[_Iterable[_Union[TokenDelta, _Mapping]]] = ..., number: _Optional[int] = ...) -> None: ...

class TokenAck(_message.Message):
    __slots__ = ("refused", "number")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    refused: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Attempt]
    number: int
    def __init__(self, refused: _Optional[_Iterable[_Union[_identity_pb2.Attempt, _Mapping]]] = ..., number: _Optional[int] = ...) -> None: ...
