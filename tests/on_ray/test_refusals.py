"""Bad input to a running server and to `serve` itself: named errors, and the server goes on."""

import json
import subprocess
import sys

import pytest

from cluster.config import load_config
from cluster.preflight import PreflightError, check
from model.synthetic import make_checkpoint

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(server):
    return server


def context(cluster):
    return cluster.client.get("/v1/models").json()["data"][0]["max_model_len"]


BAD = {
    "prompt longer than the context": ({"prompt": [30] * 100_000}, "prompt", ["100000"]),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", ["0"]),
    "max_tokens beyond the context": ({"max_tokens": 10**6}, "max_tokens", ["1000000"]),
    "unknown model": ({"model": "gpt-17"}, "model", ["gpt-17"]),
    "wrong type": ({"max_tokens": "many"}, "max_tokens", ["many"]),
    "negative temperature": ({"temperature": -1}, "temperature", ["-1"]),
    "1,000 stop strings": ({"stop": [f"s{i}" for i in range(1000)]}, "stop", ["1,000"]),
    "empty prompt": ({"prompt": ""}, "prompt", []),
    "no prompt": ({"prompt": None}, "prompt", []),
    "token id out of vocabulary": ({"prompt": [10**6]}, "prompt", ["1000000"]),
    "n too large": ({"n": 100_000}, "n", ["100000"]),
    "top_p zero": ({"top_p": 0}, "top_p", ["0"]),
    "presence_penalty too strong": ({"presence_penalty": 3}, "presence_penalty", ["3", "from -2 to 2"]),
    "repetition_penalty zero": ({"repetition_penalty": 0}, "repetition_penalty", ["0"]),
    "min_p above 1": ({"min_p": 1.5}, "min_p", ["1.5"]),
    "a bias on no token": ({"logit_bias": {"1000000": 1}}, "logit_bias", ["1000000"]),
    "no time at all": ({"timeout": 0}, "timeout", ["0"]),
    "a bias beyond 100": ({"logit_bias": {"30": 101}}, "logit_bias", ["101"]),
    "more min_tokens than max_tokens": ({"min_tokens": 3}, "min_tokens", ["3", "from 0 to 2"]),
    "a blank bad word": ({"bad_words": ["x", " "]}, "bad_words", ['" "']),
    "a token that cannot be allowed": ({"allowed_token_ids": [30, 10**6]}, "allowed_token_ids", ["1000000"]),
    "a format that is none": ({"response_format": {"type": "xml"}}, "response_format", ["xml", "json_schema"]),
    "a schema that is none": ({"guided_json": {"type": "nothing"}}, "guided_json", ["Invalid type: nothing"]),
    "a schema without end": ({"guided_regex": "(a{1000}b){1000}" * 99}, "guided_regex", ["cannot be held to"]),
    "tools in a completion": ({"tools": [{"type": "function"}]}, "tools", ["not supported"]),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options", []),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_field_is_named_and_the_server_goes_on(cluster, case):
    fields, param, said = BAD[case]
    answer = cluster.client.post("/v1/completions", json={"prompt": [30, 31], "max_tokens": 2} | fields)
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert all(words in error["message"] for words in said), error
    assert len(cluster.complete([30, 31], max_tokens=2, ignore_eos=True)["token_ids"]) == 2


TOOL = {"type": "function", "function": {"name": "f"}}
BAD_CHAT = {
    "no tools": ({"tools": []}, "tools"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "a choice without tools": ({"tool_choice": "auto"}, "tool_choice"),
    "a call of no tool": ({"tools": [TOOL], "tool_choice": "must"}, "tool_choice"),
    "a result without a call": ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
}


@pytest.mark.parametrize("case", BAD_CHAT)
def test_a_bad_chat_field_is_named_and_the_server_goes_on(cluster, case):
    fields, param = BAD_CHAT[case]
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answer = cluster.client.post("/v1/chat/completions", json=body | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert cluster.post("/v1/chat/completions", body)["choices"]


def test_a_bias_decides_what_a_worker_samples_and_stop_tokens_wait(cluster):
    """The parameters reach the sampler: +100 wins, a penalty of what it gave moves on, min_tokens holds stops."""
    options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    plain = cluster.complete([30, 31], **options)
    biased = cluster.complete([30, 31], logit_bias={"77": 100}, **options)
    assert biased["token_ids"] == [77] * 8
    assert plain["token_ids"] != biased["token_ids"]
    likeliest = next(iter(biased["logprobs"]["top_logprobs"][0].values()))
    assert biased["logprobs"]["token_logprobs"][0] < likeliest  # the model's own, from before the bias
    held = cluster.complete([30, 31], logit_bias={"77": 100}, stop_token_ids=[77], min_tokens=3, **options)
    assert 77 not in held["token_ids"][:3]
    assert held["token_ids"][3:] == [77]
    assert held["finish_reason"] == "stop"
    moved = cluster.complete([30, 31], frequency_penalty=2, logit_bias={"77": 100, "78": 99}, **options)
    assert set(moved["token_ids"]) == {77, 78}


def test_a_request_whose_time_is_up_leaves_nothing_at_its_worker(cluster):
    """504, and every block is free again."""
    asked = {"prompt": [30, 31], "max_tokens": context(cluster) - 2, "ignore_eos": True, "n": 4}
    late = cluster.client.post("/v1/completions", json=asked | {"timeout": 0.3})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")

    def is_empty(status):
        gauges = next(w for w in status["workers"] if w["role"] == "attention")["gauges"]
        return gauges["sequences_open"] == 0 and status["scheduler"]["gauges"]["running"] == 0

    cluster.wait_for_status(is_empty)


def test_a_chat_with_tools_is_a_thought_until_the_model_ends_it(cluster):
    """A random model never does: all of it is reasoning, by its name and in the usage."""
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "max_tokens": 6, "seed": 1}
    answer = cluster.post("/v1/chat/completions", asked | {"ignore_eos": True})
    message = answer["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning"] == message["reasoning_content"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6
    prompt = cluster.post("/tokenize", {key: asked[key] for key in ("messages", "tools")})
    assert prompt["count"] == answer["usage"]["prompt_tokens"]
    shown = cluster.post("/detokenize", {"tokens": prompt["tokens"]})["prompt"]
    assert '<tool>{"name": "f"}</tool>' in shown
    assert shown.endswith("]~b]ai\n<think>\n")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [(b'{"prompt": ', "application/json", 400), (b"[1]", "application/json", 400), (b"x", "text/plain", 415)],
    ids=["cut short", "not an object", "not JSON"],
)
def test_a_body_that_is_no_request_is_refused(cluster, content, kind, status):
    answer = cluster.client.post("/v1/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def serve(*flags):
    command = [sys.executable, "-m", "cluster.cli", "serve", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def broken(tmp_path):
    """A checkpoint to break."""
    make_checkpoint("tiny", tmp_path / "tiny", seed=0)
    return tmp_path / "tiny"


def set_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_truncated_shard_is_named_before_anything_starts(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    ran = serve("--model", broken)
    assert ran.returncode == 2
    assert "model.safetensors" in ran.stderr
    assert "Traceback" not in ran.stderr


def refusal(model):
    """What `serve` would print before it exits with 2."""
    with pytest.raises(PreflightError) as refused:
        check(load_config(None, {"model": str(model)}))
    return str(refused.value)


def test_a_missing_shard_is_named(broken):
    (broken / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(broken)


def test_an_unknown_scoring_function_is_named_with_what_is_accepted(broken):
    set_config(broken, scoring_func="softplus")
    assert all(word in refusal(broken) for word in ("scoring_func", "softplus", "sigmoid"))


def test_more_weights_than_memory_are_refused_with_both_numbers(broken):
    """A checkpoint whose headers promise half a terabyte, in a sparse file."""
    config = json.loads((broken / "config.json").read_text())
    wide = config["intermediate_size"] * 200_000
    header_size = int.from_bytes((weights := broken / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8 : 8 + header_size])
    set_config(broken, intermediate_size=wide)
    at = 0
    for name in sorted(k for k in header if k != "__metadata__"):
        entry = header[name]
        if ".experts." in name:
            entry["shape"][1 if ".w2." in name else 0] = wide
        size = entry["shape"][0] * (entry["shape"][1] if len(entry["shape"]) > 1 else 1) * 4
        entry["data_offsets"] = [at, at + size]
        at += size
    text = json.dumps(header).encode()
    with weights.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    said = refusal(broken)
    assert "GiB" in said
    assert "memory" in said
