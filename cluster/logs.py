"""What a process of the cluster says on stderr: a line for each record, for people or, in JSON, for machines.

Records hold no prompts, answers, keys or headers: of a call its route, outcome, sizes and the name of its key.
Lines said while a call is answered carry its request id and place in a trace.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any, Literal

from gateway.visit import VISIT

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def to_stderr(form: Literal["text", "json"]) -> None:
    """From now on, and whatever was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        visit = VISIT.get(None)
        line = super().format(record)
        return f"{line} [request {visit.name}]" if visit and not record.exc_info else line


class JsonLines(logging.Formatter):
    """An object a line: what every record has, what the call is, and what the record brought as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(
                timespec="milliseconds"
            ),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (visit := VISIT.get(None)) is not None:
            trace = visit.trace
            said |= {"request_id": visit.name, "trace_id": trace.trace_id, "span_id": trace.span_id}
        said |= {name: value for name, value in vars(record).items() if name not in _KNOWN}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False, default=str)
