"""Whether a grammar can be held to, found out within bounds of size and time before anything is submitted."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from gateway.errors import BadRequest, NotReady, presentable

START_S_MAX = 60.0
"""Longest wait for the compiling process to read the tokenizer: 2 s for 200,000 tokens on an idle core."""

VERDICTS_MAX = 1024
"""Grammars whose verdicts are remembered."""


class GrammarJudge:
    """Asked from any thread; one grammar at a time is compiled, in a process that is begun with the first."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos: Sequence[int]) -> None:
        self._told = {"tokenizer": str(tokenizer), "vocab_size": vocab_size, "eos": list(eos)}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: OrderedDict[str, str] = OrderedDict()

    def check(self, grammar: str, param: str, bytes_max: int, s_max: float) -> None:
        """Raises BadRequest naming `param`; NotReady where others' grammars are being compiled for too long."""
        size = len(grammar.encode(errors="replace"))
        if size > bytes_max:
            raise BadRequest(
                f"{param} is a grammar of {size:,} bytes; accepted: at most {bytes_max:,}", param=param
            )
        if not self._lock.acquire(timeout=START_S_MAX):
            raise NotReady("grammars of other requests are being compiled", retry_after_s=1.0)
        try:
            trouble = self._verdicts.get(grammar)
            if trouble is None:
                trouble = self._verdicts[grammar] = self._asked(grammar, s_max)
                if len(self._verdicts) > VERDICTS_MAX:
                    self._verdicts.popitem(last=False)
        finally:
            self._lock.release()
        if trouble:
            raise BadRequest(f"{param} cannot be held to: {presentable(' '.join(trouble.split()))}", param=param)

    def _asked(self, grammar: str, s_max: float) -> str:
        if self._process is None or self._process.poll() is not None:
            self._begin()
        answer = self._answer({"grammar": grammar}, s_max)
        if answer is not None:
            return answer
        self._end()
        return f"compiling it takes longer than {s_max:g} s, or too much memory; accepted: a simpler one"

    def _begin(self) -> None:
        # Not as a module of this package, which need not be found from there; and nothing beside it is imported.
        command = [sys.executable, "-P", str(Path(__file__).with_name("grammar_process.py"))]
        self._process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        weakref.finalize(self, _end, self._process)
        if self._answer(self._told, START_S_MAX) is None:
            self._end()
            raise NotReady("the process that compiles grammars did not start", retry_after_s=1.0)

    def _answer(self, question: dict[str, object], s_max: float) -> str | None:
        """None: none came in time, or the process is gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            return None
        line, until_s, pipe = b"", time.monotonic() + s_max, self._process.stdout
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, until_s - time.monotonic()))
            more = os.read(pipe.fileno(), 65536) if ready else b""
            if not more:
                return None
            line += more
        return str(json.loads(line)["trouble"])

    def _end(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
