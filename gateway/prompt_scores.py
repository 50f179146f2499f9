"""Logprobs of a request's prompt on their way: every choice begins with them, so what comes before them waits."""

from __future__ import annotations

from gateway.request import GenerateRequest, PromptLogprob, TokenDelta


class PromptScores:
    """Of one request. They come with its first sequence, in order; siblings on other workers may be ahead."""

    def __init__(self, request: GenerateRequest) -> None:
        self._num_wanted = len(request.prompt) - 1  # nothing comes before the first token
        self._found: list[PromptLogprob] = []
        self._waiting: list[tuple[int, TokenDelta]] = []

    @property
    def is_complete(self) -> bool:
        return len(self._found) == self._num_wanted

    def take(self, choice: int, delta: TokenDelta) -> None:
        self._found += delta.prompt_logprobs
        if not delta.prompt_logprobs:
            self._waiting.append((choice, delta))

    def all(self) -> tuple[PromptLogprob, ...]:
        """Of the prompt's second token on."""
        return tuple(self._found)

    def waited(self) -> list[tuple[int, TokenDelta]]:
        """What came meanwhile, in order."""
        return self._waiting


def is_wanted(request: GenerateRequest) -> bool:
    """Whether there is any to wait for."""
    return request.num_prompt_logprobs is not None and len(request.prompt) > 1
