"""A process of its own that compiles grammars for its gateway, so that one without end can be ended.

Run as a script; knows nothing of the gateway. On stdin lines of JSON: first {tokenizer, vocab_size, eos}, then
{grammar} each, answered on stdout by {trouble}, empty where the grammar compiles and a short walk through it finds
its way. Ends with its stdin, and with the thread that began it.
"""

from __future__ import annotations

import ctypes
import json
import random
import resource
import signal
import sys
from pathlib import Path

import llguidance
import numpy as np

WALK_TOKENS = 16
MEMORY_BYTES_MAX = 8 << 30
LIMITS = llguidance.LLParserLimits(
    step_lexer_fuel=50_000, step_max_items=20_000, max_lexer_states=20_000, verbose_errors=False
)
"""Those of the workers."""

_PR_SET_PDEATHSIG = 1


def trouble_of(tokens: llguidance.LLTokenizer, grammar: str) -> str:
    matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    chance = random.Random(0)
    for _ in range(WALK_TOKENS):
        if matcher.is_error():
            return str(matcher.get_error())
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, count=tokens.vocab_size, bitorder="little"))
        if matcher.is_error():
            return str(matcher.get_error())
        if not len(allowed):
            return "nothing can be written that it allows"
        token = int(allowed[chance.randrange(len(allowed))])
        if token in tokens.eos_tokens:
            break
        matcher.consume_token(token)
    return ""


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    told = json.loads(sys.stdin.readline())
    text = Path(told["tokenizer"]).read_text()
    tokens = llguidance.LLTokenizer(text, n_vocab=told["vocab_size"], eos_token=told["eos"])
    print(json.dumps({"trouble": ""}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"trouble": trouble_of(tokens, json.loads(line)["grammar"])}), flush=True)


if __name__ == "__main__":
    main()
