"""What one gateway is told at birth: its limits, each with a name, a unit and bounds of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from gateway.keys import KeyHash, NamedKey

# Absolute: the gateway's process may have another working folder.
_File = Annotated[str, Field(min_length=1), AfterValidator(lambda file: str(Path(file).absolute()))]


class GatewayConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    # --- who may enter ------------------------------------------------------------------------

    api_key: KeyHash | None = None
    """What clients must send as `Authorization: Bearer` or `x-api-key`: the key, or `sha256:` and its hash, which
    is all that is kept. Null, and no `keys`: nobody is asked."""

    admin_key: KeyHash | None = None
    """Opens every door, and alone those that watch and change the cluster. Null: `api_key` opens them, too, and
    where there is none and no `keys`, everybody may."""

    keys: tuple[NamedKey, ...] = Field(default=(), max_length=1024)
    """Further keys, each a tenant with a name and limits of its own. They open no admin doors."""

    cors_origins: tuple[str, ...] = Field(default=(), max_length=64)
    """Web pages that may call, such as `https://chat.example.org`; `*`: all. Calls of other pages are refused."""

    tls_cert: _File | None = None
    """The gateway's certificate and its chain (PEM): then REST and gRPC are served over TLS 1.2 or later."""

    tls_key: _File | None = None
    """The certificate's private key, unencrypted."""

    tls_client_ca: _File | None = None
    """Who signs clients' certificates: then each must present one, probes and scrapers too."""

    # --- one client call: beyond these 400, 413 for the body, 431 for the head ----------------

    head_bytes_max: int = Field(default=64 * 2**10, ge=8192, le=2**24)
    """Largest request line and headers of a call that has not got beyond them yet."""

    unknown_fields: Literal["warn", "refuse"] = "warn"
    """What a field of a request means that nobody reads: a header that names it, or 400."""

    body_bytes_max: int = Field(default=8 * 2**20, ge=1024, le=2**30)
    """Largest request body. A 200,000-token prompt as ids is 1.4 MB, as text about 1 MB."""

    prompts_max: int = Field(default=64, ge=1, le=1024)
    """Prompts in one /v1/completions call."""

    n_max: int = Field(default=64, ge=1, le=1024)
    """`n`: sequences per prompt."""

    stop_strings_max: int = Field(default=16, ge=1, le=256)
    """Stop strings per request. Each is searched for in every token's text."""

    stop_chars_max: int = Field(default=256, ge=1, le=4096)
    """Longest stop string: as much text may be held back while it could still become one."""

    stop_token_ids_max: int = Field(default=64, ge=1, le=1024)
    """`stop_token_ids` per request, eos not counted."""

    tools_max: int = Field(default=256, ge=1, le=4096)
    """Tools in one chat call. Their text is part of the prompt, whose length bounds it too."""

    logit_bias_max: int = Field(default=1024, ge=0, le=2**16)
    """Tokens in one request's `logit_bias`: its message grows with them, and every step adds each."""

    bad_words_max: int = Field(default=128, ge=0, le=1024)
    """`bad_words` per request: every step looks for each, as it is and with a space before it."""

    bad_word_chars_max: int = Field(default=256, ge=1, le=4096)
    """Longest bad word."""

    allowed_token_ids_max: int = Field(default=4096, ge=1, le=2**20)
    """Tokens in one request's `allowed_token_ids`. Each takes some 40 bytes here and at the worker."""

    grammar_bytes_max: int = Field(default=64 * 2**10, ge=256, le=2**20)
    """Largest grammar that an answer is held to, schemas of forced tools included."""

    grammar_s_max: float = Field(default=2.0, gt=0, le=60)
    """Longest time that compiling one may take; as long may others wait whose grammars come next."""

    logprobs_max: int = Field(default=20, ge=0, le=64)
    """Alternatives shown per token, of a prompt's tokens too."""

    prompt_logprobs_max: int = Field(default=2**18, ge=1, le=2**24)
    """Logprobs of one call's prompts: tokens times `n` times (1 + alternatives). Each takes some 150 bytes until
    the call is answered."""

    cache_shared_by: Literal["all", "key", "user"] = "all"
    """Who shares cached prefixes where a request gives no `cache_salt`: everybody, those of one API key, or of one
    `user` of a key only."""

    # --- all calls together -------------------------------------------------------------------

    in_flight_max: int = Field(default=1024, ge=1, le=2**20)
    """Sequences open at once in this gateway; beyond: 429. Memory is this times a context of tokens."""

    bodies_bytes_max: int = Field(default=256 * 2**20, ge=1024, le=2**36)
    """Request bodies being read and parsed at once, together; beyond: 429. At least `body_bytes_max`."""

    connections_max: int = Field(default=4096, ge=1, le=2**20)
    """HTTP connections open at once, calls or none; beyond: 429. Each takes a file descriptor."""

    attempts_max: int = Field(default=16, ge=1, le=1024)
    """Placements of one sequence, the first included, before its client is told that it failed."""

    request_s_max: float = Field(default=3600.0, gt=0)
    """Longest time a request may take, queueing included, and how long it has where its client names no `timeout`
    and its gRPC call no deadline; then 504."""

    silence_s_max: float = Field(default=600.0, gt=0)
    """Longest wait for any next token of a call, queueing included, before it is given up (503)."""

    client_stall_s_max: float = Field(default=60.0, gt=0)
    """Longest time a client may leave its socket full, or take to send a head or a body; then it counts as hung
    up."""

    client_idle_s: int = Field(default=75, ge=1, le=86400)
    """Whole seconds that a connection is kept between two calls. Longer than clients keep theirs, which is seldom
    over a minute: what they send just as it is closed would be lost."""

    grpc_rpcs_max: int = Field(default=2048, ge=16, le=2**20)
    """RPCs open at once, health watches included; beyond: RESOURCE_EXHAUSTED. Above `in_flight_max`, so that a
    probe is answered when calls are refused for load."""

    grpc_ping_s_min: float = Field(default=5.0, ge=0.1)
    """How often a gRPC client may ask whether we live; one that goes on asking more often is cut off."""

    grpc_keepalive_s: float = Field(default=30.0, ge=1)
    grpc_keepalive_timeout_s: float = Field(default=20.0, ge=1)
    """A silent gRPC client is asked after this long, and counts as hung up when it stays silent that long."""

    retry_after_s: float = Field(default=1.0, ge=0)
    """What a refused client is told to wait where the scheduler names no time."""

    # --- links inside the cluster -------------------------------------------------------------

    submit_timeout_s: float = Field(default=10.0, gt=0)
    """Longest wait for the scheduler to accept or reject; then 503."""

    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Longest wait for the scheduler's welcome on a new stream."""

    reconnect_s_min: float = Field(default=0.05, gt=0)
    """Pause before the first reconnection to the scheduler; it doubles up to `reconnect_s_max`."""

    reconnect_s_max: float = Field(default=1.0, gt=0)

    keepalive_s: float = Field(default=10.0, ge=1)
    keepalive_timeout_s: float = Field(default=20.0, ge=1)
    """A silent scheduler is asked after this long, and its stream ended when it stays silent that long."""

    link_queue_max: int = Field(default=4096, ge=16)
    """Messages waiting for the scheduler's stream. When full the stream is broken and begun anew."""

    submit_bytes_max: int = Field(default=12 * 2**20, ge=1024)
    """Largest submission to the scheduler. One that claims or resumes more is said in parts."""

    message_bytes_max: int = Field(default=64 * 2**20, ge=2**20, le=2**31 - 1)
    """Largest message on a link."""

    status_timeout_s: float = Field(default=5.0, gt=0)
    """Longest wait for the controller's status document."""

    rebalance_timeout_s: float = Field(default=60.0, gt=0)
    """Longest wait for the controller to work out a better placement: seconds for large models."""

    watch_s: float = Field(default=0.5, ge=0.05)
    """Between two looks at the cluster while anybody watches its events."""

    watchers_max: int = Field(default=64, ge=1, le=2**16)
    """Who may watch the cluster's events at once; beyond: 429."""

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@*]+", origin):
                raise ValueError(f"cors_origins has {origin!r}; accepted: * or scheme://host:port without a path")
        return origins

    @model_validator(mode="after")
    def _keys_differ(self) -> GatewayConfig:
        names = [named.name for named in self.keys]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"keys: the name {twice[0]!r} is given twice; accepted: a name of its own for each")
        labels = {"api_key": self.api_key, "admin_key": self.admin_key}
        labels |= {f"the key of {named.name!r}": named.key for named in self.keys}
        seen: dict[str, str] = {}
        for label, key in labels.items():
            if key is not None and (other := seen.setdefault(key, label)) != label:
                raise ValueError(f"{other} and {label} are the same; accepted: keys that differ")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> GatewayConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_cert" if self.tls_cert is None else "tls_key"
            raise ValueError(f"{missing} is null; accepted: a file, since tls_cert and tls_key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(f"tls_client_ca is {self.tls_client_ca!r}; accepted: null, unless tls_cert is given")
        return self

    @model_validator(mode="after")
    def _one_body_fits(self) -> GatewayConfig:
        if self.bodies_bytes_max < self.body_bytes_max:
            least = f"at least body_bytes_max, {self.body_bytes_max}"
            raise ValueError(f"bodies_bytes_max is {self.bodies_bytes_max}; accepted: {least}")
        return self
