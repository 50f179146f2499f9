"""What people build on the APIs' own packages, unmodified and in a process of its own, against a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.on_ray.served import Served

pytestmark = pytest.mark.ray

WITHIN_S = 240.0
CITIES = ("Bonn", "Köln")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and nobody asks the network for anything."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    return tmp_path


def ran(*command: str) -> str:
    """The last line that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().rpartition("\n")[2]


def script(name: str, server: Served) -> dict[str, Any]:
    seen: dict[str, Any] = json.loads(ran(sys.executable, str(Path(__file__).with_name(name)), server.url))
    return seen


def test_litellm_speaks_to_it_as_to_openai_and_as_to_anthropic(server: Served, home: Path) -> None:
    """Tools, thoughts and streams by either of its providers."""
    for seen in script("client_litellm.py", server).values():
        name, arguments = seen["tool"]
        assert (name, seen["finish_reason"], seen["thought"]) == ("look_up", "tool_calls", True)
        assert arguments["city"] in CITIES
        assert seen["streamed"] > 5
        assert seen["stream_end"] in ("length", "stop")


def test_langchain_calls_tools_parses_and_streams(server: Served, home: Path) -> None:
    """Over chat completions and over responses."""
    for seen in script("client_langchain.py", server).values():
        name, arguments = seen["tool"]
        assert (name, arguments["city"] in CITIES) == ("look_up", True)
        assert seen["parsed"]["city"] in CITIES
        assert 0 < seen["final_tokens"] <= 8
        assert seen["pieces"] > 1


def test_llm_answers_on_the_command_line(server: Served, home: Path) -> None:
    """Streamed, held to a schema; its configuration is JSON, which YAML can be."""
    model = {"model_id": "local", "model_name": "tiny", "api_base": f"{server.url}/v1", "supports_schema": True}
    (home / "extra-openai-models.yaml").write_text(json.dumps([model]))
    schema = {
        "type": "object",
        "properties": {"city": {"enum": list(CITIES)}},
        "required": ["city"],
        "additionalProperties": False,
    }
    command = [sys.executable, "-m", "llm", "-m", "local", "--key", "none", "--no-log", "-o", "max_tokens", "200"]
    assert json.loads(ran(*command, "--schema", json.dumps(schema), "Weather in Cologne?"))["city"] in CITIES
