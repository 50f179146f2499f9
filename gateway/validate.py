"""From a client's body to GenerateRequests: defaults, limits, tokens. All that is wrong with it ends here.

Decisions a client can see:
- what the client leaves open (temperature, top_p, top_k, min_p, repetition_penalty) comes from the checkpoint's
  generation_config.json;
- `max_tokens` left open is 16 for completions and what the context leaves for chat, and never more than that;
  given, it must fit: more than the context leaves is refused, not cut;
- an unseeded request gets a random seed, each prompt of a list its own;
- a temperature below 0.0001 is 0: dividing by less overflows float32, and the highest logit wins anyway;
- `max_tokens` 0 with `echo` is one token that nobody is shown or billed;
- `best_of` may say what `n` says: nothing is sampled beyond what is shown;
- `min_tokens` holds back stop strings as well as stop tokens, eos among them;
- a tool_choice of "none" hides the tools from the model; `strict` of a tool that need not be called is let
  through, and named as ignored;
- `model` left out is the served model.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
import uuid
from dataclasses import dataclass
from typing import Any

from gateway import constraints
from gateway.bodies import ChatBody, CompletionBody, GenerateBody, accepted_for, read, unsupported
from gateway.config import GatewayConfig
from gateway.errors import BadRequest, TooLarge, invalid, shown
from gateway.model_card import ModelCard
from gateway.prompts import Prompt, Prompts, check_model, token_ids
from gateway.request import GenerateRequest, Sampling
from gateway.structure import Structure
from gateway.tools import Tool

_TEMPERATURE_MIN = 1e-4
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
_UINT64 = 2**64
_BIAS_MAX = 100.0


@dataclass(frozen=True)
class Call:
    """One valid client call. Choices are numbered over `requests` in order, n for each."""

    id: str
    requests: tuple[GenerateRequest, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    tokens_as_ids: bool
    ignored: tuple[str, ...]  # names of fields nobody looked at
    tools: tuple[Tool, ...] = ()  # those the model may call
    parallel_tool_calls: bool = True
    is_call_named: bool = False  # the client said which tool is called
    include_reasoning: bool = True
    echo: bool = False  # the prompt is said again before each answer
    wants_answer: bool = True  # False: only the echo
    num_prompt_logprobs: int | None = None  # to be shown beside the choices
    repeated: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the request, in its answer

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    def within(self, time_s: float | None) -> Call:
        """With no more time than so much. None: as it is."""
        if time_s is None:
            return self
        limited = (dataclasses.replace(r, time_s=min(r.time_s, max(time_s, 0.0))) for r in self.requests)
        return dataclasses.replace(self, requests=tuple(limited))

    def request_of(self, choice: int) -> GenerateRequest:
        return self.requests[choice // self.requests[0].n]

    def siblings_of(self, choice: int) -> range:
        """Choices of the same request, itself included."""
        n = self.requests[0].n
        return range(choice // n * n, choice // n * n + n)


class Validator:
    """Raises BadRequest or NotFound, naming field, value and what is accepted.

    `model_len_max`: longest prompt and answer together, in tokens.
    """

    def __init__(self, card: ModelCard, config: GatewayConfig, model_len_max: int) -> None:
        self._card = card
        self._config = config
        self._model_len_max = model_len_max
        self._prompts = Prompts(card, config)
        self._structure = Structure(card, config)

    def completion(self, raw: dict[str, Any]) -> Call:
        body, ignored = read(raw, CompletionBody)
        check_model(body, self._card)
        if body.logprobs is not None and body.logprobs > self._config.logprobs_max:
            raise invalid("logprobs", body.logprobs, f"an integer from 0 to {self._config.logprobs_max}")
        if body.max_tokens == 0 and not body.echo:
            raise invalid("max_tokens", 0, accepted_for(CompletionBody, "max_tokens"))
        if body.best_of not in (None, body.n or 1):
            raise unsupported("best_of", body.best_of, (None, body.n or 1))
        prompts = self._prompts.of_completion(body.prompt)
        asked = 1 if body.max_tokens == 0 else body.max_tokens
        limits = [self._room(prompt, "prompt", "max_tokens", asked, _COMPLETION_TOKENS) for prompt in prompts]
        scores = [k for k in (body.prompt_logprobs, body.logprobs if body.echo else None) if k is not None]
        call = self._call("cmpl-", body, ignored, prompts, limits, body.logprobs, max(scores, default=None))
        requests = self._structure.of_completion(body, call.requests)
        return dataclasses.replace(
            call, requests=requests, echo=bool(body.echo), wants_answer=body.max_tokens != 0
        )

    def chat(self, raw: dict[str, Any], prefix: str = "chatcmpl-") -> Call:
        """`prefix`: of the call's name."""
        body, ignored = read(raw, ChatBody)
        check_model(body, self._card)
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs", body.top_logprobs, "nothing, unless logprobs is true")
        top = body.top_logprobs or 0
        if top > self._config.logprobs_max:
            raise invalid("top_logprobs", top, f"an integer from 0 to {self._config.logprobs_max}")
        tools = self._prompts.tools(body.tools, body.tool_choice)
        prompt = self._prompts.of_chat(body.messages, tools)
        name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        limit = self._room(prompt, "messages", name, asked, self._model_len_max)
        num_logprobs = top if body.logprobs else None
        call = self._call(prefix, body, ignored, [prompt], [limit], num_logprobs, body.prompt_logprobs)
        request = self._structure.of_chat(body, tools, call.requests[0])
        if any(tool.is_strict for tool in tools) and not (request.grammar and request.grammar.text):
            ignored += ("tools.strict",)
        return dataclasses.replace(
            call,
            requests=(request,),
            ignored=ignored,
            tools=tools,
            is_call_named=isinstance(body.tool_choice, dict),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            include_reasoning=body.include_reasoning is not False,
        )

    def tokenised(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The answer of /tokenize."""
        return self._prompts.tokenised(raw, self._model_len_max)

    def detokenised(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The answer of /detokenize."""
        return self._prompts.detokenised(raw)

    # --- parameters ----------------------------------------------------------------------------

    def _call(
        self,
        prefix: str,
        body: GenerateBody,
        ignored: tuple[str, ...],
        prompts: list[Prompt],
        limits: list[int],
        num_logprobs: int | None,
        num_prompt_logprobs: int | None,
    ) -> Call:
        self._check_prompt_logprobs(body, prompts, num_prompt_logprobs)
        include_usage = self._include_usage(body)
        n = body.n or 1
        if n > self._config.n_max:
            raise invalid("n", n, f"an integer from 1 to {self._config.n_max}")
        stop, stop_token_ids = self._stop(body), self._stop_token_ids(body)
        sampling = self._sampling(body)
        constraints.check_left(sampling, stop_token_ids, body.min_tokens or 0, self._card.vocab_size)
        call_id = f"{prefix}{uuid.uuid4().hex}"
        requests = tuple(
            GenerateRequest(
                request_id=f"{call_id}-{number}",
                prompt=prompt,
                sampling=dataclasses.replace(
                    sampling, seed=secrets.randbits(64) if body.seed is None else body.seed % _UINT64
                ),
                max_tokens=limit,
                n=n,
                stop=stop,
                stop_token_ids=stop_token_ids,
                num_logprobs=num_logprobs,
                priority=body.priority or 0,
                tenant=body.user or "",
                min_tokens=self._min_tokens(body, limit),
                cache_salt=self._cache_salt(body),
                num_prompt_logprobs=num_prompt_logprobs,
                time_s=self._time_s(body),
            )
            for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        )
        return Call(
            call_id,
            requests,
            bool(body.stream),
            include_usage,
            bool(body.return_token_ids),
            bool(body.return_tokens_as_token_ids),
            ignored,
            num_prompt_logprobs=body.prompt_logprobs,
        )

    def _check_prompt_logprobs(self, body: GenerateBody, prompts: list[Prompt], wanted: int | None) -> None:
        """`wanted`: by the body, or by its echo."""
        if wanted is None:
            return
        config, asked = self._config, body.prompt_logprobs
        param = "logprobs" if asked is None else "prompt_logprobs"
        if asked is not None and body.stream:
            raise invalid("prompt_logprobs", asked, "null, unless stream is false")
        num_tokens = sum(map(len, prompts)) * (body.n or 1)
        most = min(config.logprobs_max, config.prompt_logprobs_max // num_tokens - 1)
        counted = f"{num_tokens} prompt tokens, times n"
        if most < 0:
            raise TooLarge(
                f"{param} is {wanted} for {counted}; accepted: at most {config.prompt_logprobs_max}", param=param
            )
        if wanted > most:
            raise invalid(param, wanted, f"an integer from 0 to {most} for {counted}")

    def _cache_salt(self, body: GenerateBody) -> str:
        """Where users are kept apart, no given salt is taken for a user's own."""
        if self._config.cache_shared_by == "all":
            return body.cache_salt or ""
        return f"salt {body.cache_salt}" if body.cache_salt else f"user {body.user or ''}"

    def _time_s(self, body: GenerateBody) -> float:
        most = self._config.request_s_max
        if body.timeout is not None and body.timeout > most:
            raise invalid("timeout", body.timeout, f"a number of seconds above 0 and at most {most:g}")
        return body.timeout or most

    def _include_usage(self, body: GenerateBody) -> bool:
        options = body.stream_options or {}
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", options, "nothing, unless stream is true")
        include_usage = options.get("include_usage") or False
        if not isinstance(include_usage, bool):
            raise invalid("stream_options.include_usage", include_usage, "true or false")
        return include_usage

    def _sampling(self, body: GenerateBody) -> Sampling:
        defaults = self._card.defaults
        temperature = defaults.temperature if body.temperature is None else body.temperature
        return Sampling(
            temperature=temperature if temperature >= _TEMPERATURE_MIN else 0.0,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            top_k=defaults.top_k if body.top_k is None else min(max(body.top_k, 0), self._card.vocab_size),
            min_p=defaults.min_p if body.min_p is None else body.min_p,
            repetition_penalty=(
                defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty
            ),
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logit_bias=self._logit_bias(body.logit_bias),
            allowed_token_ids=(
                ()
                if body.allowed_token_ids is None
                else constraints.allowed_token_ids(body.allowed_token_ids, self._card, self._config)
            ),
            bad_words=constraints.bad_words(body.bad_words or [], self._prompts, self._config),
        )

    def _logit_bias(self, given: Any) -> tuple[tuple[int, float], ...]:
        if given is None:
            return ()
        if not isinstance(given, dict):
            raise invalid("logit_bias", given, accepted_for(GenerateBody, "logit_bias"))
        vocab_size, most = self._card.vocab_size, self._config.logit_bias_max
        if len(given) > most:
            raise BadRequest(
                f"logit_bias has {len(given):,} entries; accepted: at most {most:,}", param="logit_bias"
            )
        for key, bias in given.items():
            if not re.fullmatch(r"0|[1-9]\d{0,9}", key, re.ASCII) or int(key) >= vocab_size:
                raise BadRequest(
                    f"logit_bias has the key {shown(key)}; accepted: token ids from 0 to {vocab_size - 1}",
                    param="logit_bias",
                )
            if type(bias) not in (int, float) or not -_BIAS_MAX <= bias <= _BIAS_MAX:
                raise invalid(f"logit_bias.{key}", bias, "a number from -100 to 100")
        return tuple(sorted((int(key), float(bias)) for key, bias in given.items() if bias))

    def _min_tokens(self, body: GenerateBody, limit: int) -> int:
        asked = body.min_tokens or 0
        if asked > limit:
            raise invalid("min_tokens", asked, f"an integer from 0 to {limit}, the most that may be generated")
        return asked

    def _stop(self, body: GenerateBody) -> tuple[str, ...]:
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        config = self._config
        if stop:
            self._prompts.tokenizer("stop", "stop_token_ids")
        if len(stop) > config.stop_strings_max:
            raise invalid("stop", stop, f"at most {config.stop_strings_max} strings")
        for number, one in enumerate(stop):
            if not 1 <= len(one) <= config.stop_chars_max:
                raise invalid(f"stop[{number}]", one, f"a string of 1 to {config.stop_chars_max} characters")
        return tuple(dict.fromkeys(stop))

    def _stop_token_ids(self, body: GenerateBody) -> frozenset[int]:
        ids = body.stop_token_ids or []
        if len(ids) > self._config.stop_token_ids_max:
            raise invalid("stop_token_ids", ids, f"at most {self._config.stop_token_ids_max} token ids")
        own = frozenset(token_ids(ids, "stop_token_ids", self._card))
        return own if body.ignore_eos else own | self._card.eos

    def _room(self, prompt: Prompt, param: str, limit_param: str, asked: int | None, default: int) -> int:
        """How many tokens each sequence may generate."""
        context, room = self._model_len_max, self._model_len_max - len(prompt)
        if room < 1:
            raise TooLarge(
                f"{param} has {len(prompt)} tokens; accepted: at most {context - 1}, so that one more fits into "
                f"the context of {context}: shorten it by at least {1 - room} tokens",
                param=param,
            )
        if asked is not None and asked > room:
            raise TooLarge(
                f"{limit_param} is {asked}; accepted: at most {room}, what the {len(prompt)} tokens of {param} "
                f"leave of the context of {context}",
                param=limit_param,
            )
        return min(default, room) if asked is None else asked
