"""A whole cluster on a real Ray: it serves, survives, and leaves nothing behind. One cluster, in order."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import jsonschema
import psutil
import pytest
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from openai import BadRequestError, OpenAI

from attention_workers.trace_records import decode
from attention_workers.trace_summary import summarise
from tests.on_ray.served import Served, folders

pytestmark = pytest.mark.ray

README = Path(__file__).parents[2] / "README.md"
WITHIN_S = 90.0
GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


def listed_sockets() -> dict[str, str]:
    """Inode to name of every abstract socket of this kind on the machine."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if "@expertmesh" in line]
    return {row[6]: row[7] for row in rows}


def sockets_of(processes: set[psutil.Process]) -> set[str]:
    """The abstract sockets that these processes hold, by name."""
    links = [link for process in processes for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    held = {os.readlink(link) for link in links if link.is_symlink()}
    return {name for inode, name in listed_sockets().items() if f"socket:[{inode}]" in held}


def family(server: Served) -> set[psutil.Process]:
    return set(psutil.Process(server.process.pid).children(recursive=True))


def workers(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {worker["id"]: worker for worker in document["workers"]}


def is_whole(document: dict[str, Any]) -> bool:
    return bool(document["phase"] == "ready")


def tokens(server: Served) -> list[int]:
    ids: list[int] = server.complete([5, 6, 7], **GREEDY)["token_ids"]
    return ids


def test_a_prompt_that_comes_again_is_found_and_says_so(server: Served) -> None:
    """With the same tokens as computing it, which another salt asks for; and status counts it."""
    body = {"prompt": [(13 * i) % 90 + 20 for i in range(200)], "return_token_ids": True, **GREEDY}
    answers = [server.post("/v1/completions", {**body, **salt}) for salt in ({}, {}, {"cache_salt": "mine"})]
    found = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert found == [0, 192, 0]
    assert answers[0]["choices"][0]["token_ids"] == answers[1]["choices"][0]["token_ids"]
    assert answers[0]["choices"][0]["token_ids"] == answers[2]["choices"][0]["token_ids"]
    wanted = {"prefix_hit_tokens_total": 192, "kv_blocks_cached": 12}
    server.wait_for_status(lambda told: all(_gauge(told, name) >= least for name, least in wanted.items()))


def _gauge(document: dict[str, Any], name: str) -> float:
    gauge: float = workers(document)["attention-0"]["gauges"][name]
    return gauge


def test_pools_are_separate_processes_that_hold_their_own_weights(server: Served) -> None:
    """No expert worker reads attention weights, and no attention worker expert weights."""
    document = server.status()
    found = workers(document)
    assert found.keys() == {"attention-0", "expert-0", "expert-1"}
    assert len({worker["pid"] for worker in found.values()}) == 3
    assert {worker["state"] for worker in found.values()} == {"ready"}
    layers, experts, hidden, expert_hidden, float32 = 3, 8, 64, 32, 4
    assert found["expert-0"]["bytes_loaded"] == layers * experts * 3 * hidden * expert_hidden * float32
    assert 0 < found["attention-0"]["bytes_loaded"] < found["expert-0"]["bytes_loaded"]
    assert (found["expert-0"]["slots"], found["attention-0"]["slots"]) == (layers * experts, 0)


def test_status_command_prints_the_gateways_document(server: Served) -> None:
    command = [sys.executable, "-m", "cluster.cli", "status", "--json", "--url", server.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=True)
    assert workers(json.loads(ran.stdout)).keys() == workers(server.status()).keys()


def test_the_workers_own_trace_comes_through_gateway_and_controller(server: Served) -> None:
    """Of steps that real processes have just computed; and the command asks the same way."""
    server.complete([1, 2, 3], **GREEDY)
    document = server.client.get("/v1/admin/trace?seconds=60").raise_for_status().json()
    (trace,) = document["traces"]
    summary = summarise(decode(base64.b64decode(trace)))
    assert (summary["worker"], document["silent"]) == ("attention-0", [])
    assert summary["steps"] >= GREEDY["max_tokens"]
    assert summary["phases_us"]["experts"]["p50"] > 0
    command = [sys.executable, "-m", "cluster.cli", "trace", "--json", "--seconds", "0.1", "--url", server.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=True)
    assert [worker["worker"] for worker in json.loads(ran.stdout)["workers"]] == ["attention-0"]


def test_readmes_grpc_client_streams_what_rest_answers(server: Served) -> None:
    """The snippet as it is printed, against this cluster's port."""
    (snippet,) = re.findall(r"```python\n(import grpc\n.*?)```", README.read_text(), re.DOTALL)
    command = [sys.executable, "-c", snippet.replace(":9000", f":{server.grpc_port}")]
    ran = subprocess.run(command, capture_output=True, timeout=WITHIN_S, check=True)
    answer = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 32, "seed": 7})
    assert ran.stdout.decode() == answer["choices"][0]["text"] != ""
    assert f"gRPC on 127.0.0.1:{server.grpc_port}" in server.log


def test_both_faces_draw_the_same_tokens_and_say_the_same_of_the_cluster(server: Served) -> None:
    asked = {"max_tokens": 20, "seed": 3, "temperature": 1.0, "n": 2, "logprobs": 0, "ignore_eos": True}
    rest = server.post("/v1/completions", {"prompt": [5, 6, 7], "return_token_ids": True, **asked})["choices"]
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenIds(ids=[5, 6, 7]), options=inference_pb2.GenerateOptions(**asked)
    )
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        ours = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=WITHIN_S)
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        status = admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=WITHIN_S)
        placed = admin.GetPlacement(admin_pb2.GetPlacementRequest(), timeout=WITHIN_S)
    assert [list(choice.token_ids) for choice in ours.choices] == [choice["token_ids"] for choice in rest]
    assert rest[0]["token_ids"] != rest[1]["token_ids"]
    assert [[one.logprob for one in choice.logprobs] for choice in ours.choices] == [
        choice["logprobs"]["token_logprobs"] for choice in rest
    ]
    assert {worker.id: worker.pid for worker in status.workers} == {
        id_: worker["pid"] for id_, worker in workers(server.status()).items()
    }
    assert status.phase == admin_pb2.CLUSTER_PHASE_READY
    assert [len(holding.experts) for layer in placed.layers for holding in layer.holdings] == [8] * 6


def test_killed_expert_worker_is_replaced_and_tokens_stay_the_same(server: Served) -> None:
    """SIGKILL: the survivor goes on at once, the next life joins, the answer does not change."""
    expected, victim = tokens(server), workers(server.status())["expert-1"]
    os.kill(victim["pid"], signal.SIGKILL)
    assert tokens(server) == expected
    document = server.wait_for_status(
        lambda document: is_whole(document) and workers(document)["expert-1"]["incarnation"] == 2, WITHIN_S
    )
    assert workers(document)["expert-1"]["pid"] != victim["pid"]
    assert workers(document)["expert-0"]["incarnation"] == 1
    assert tokens(server) == expected


SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 9},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["word", "n"],
    "additionalProperties": False,
}


def test_chat_is_held_to_a_schema_behind_its_thought(server: Served) -> None:
    """By openai's client, which parses it; and over gRPC. A bad schema is refused by name."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
    }  # fmt: skip
    answer = client.chat.completions.create(**asked, extra_body={"thinking_token_budget": 9})
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 9
    options = inference_pb2.GenerateOptions(guided_json=json.dumps(SCHEMA), max_tokens=200, seed=2)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        ours = stub.Generate(inference_pb2.GenerateRequest(text="x", options=options), timeout=WITHIN_S)
    jsonschema.validate(json.loads(ours.choices[0].text), SCHEMA)
    asked["response_format"]["json_schema"]["schema"] = {"type": "nothing"}
    with pytest.raises(BadRequestError, match=r"response_format\.json_schema\.schema cannot be held to"):
        client.chat.completions.create(**asked)


def test_a_required_tool_is_called(server: Served) -> None:
    """Streamed, its arguments as they come; a random model would never call one by itself."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
    named: Any = {"type": "function", "function": {"name": "look_up"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        with client.chat.completions.stream(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], tools=[tool], tool_choice=choice,
            parallel_tool_calls=False, max_tokens=200, seed=3,
        ) as stream:  # fmt: skip
            final = stream.get_final_completion()
        assert final.choices[0].finish_reason == reason
        made: Any = final.choices[0].message.tool_calls
        assert [call.function.name for call in made] == ["look_up"]
        jsonschema.validate(json.loads(made[0].function.arguments), SCHEMA)


def test_killed_attention_worker_is_replaced_and_its_streams_go_on(server: Served) -> None:
    """Its keys and values are gone, its requests are not: the gateway has them resumed by the next life.

    One of them is held to a grammar, whose state is gone too.
    """
    long = {"prompt": [5, 6, 7], **GREEDY, "max_tokens": 150, "return_token_ids": True}
    held = {"prompt": [7, 6], "guided_regex": "([a-z]{1,4} ){60,80}", "seed": 4, "max_tokens": 400}
    bodies = [long, held | {"return_token_ids": True}]
    expected = [server.post("/v1/completions", body)["choices"][0] for body in bodies]
    assert re.fullmatch(held["guided_regex"], expected[1]["text"])  # type: ignore[call-overload]
    victim = workers(server.status())["attention-0"]["pid"]
    both_run = threading.Barrier(2, action=lambda: os.kill(victim, signal.SIGKILL))

    def streamed(body: dict[str, Any]) -> list[int]:
        ids: list[int] = []
        with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    has_begun = len(ids) >= 5
                    ids += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                    if not has_begun and len(ids) >= 5:
                        both_run.wait(WITHIN_S)
        return ids

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(streamed, bodies))
    assert found == [choice["token_ids"] for choice in expected]
    server.wait_for_status(
        lambda document: is_whole(document) and workers(document)["attention-0"]["incarnation"] == 2, WITHIN_S
    )


def test_killed_controller_comes_back_with_a_new_term_and_the_same_workers(server: Served) -> None:
    """It starts nobody again: those who live tell it who they are."""
    before, expected = server.status(), tokens(server)
    controller = psutil.Process(before["controller"]["pid"])
    controller.kill()
    assert tokens(server) == expected
    psutil.wait_procs([controller], WITHIN_S)
    _wait_answered(server)
    after = server.wait_for_status(lambda document: is_whole(document) and document["term"] == 2, WITHIN_S)
    assert {id_: w["pid"] for id_, w in workers(after).items()} == {
        id_: w["pid"] for id_, w in workers(before).items()
    }  # fmt: skip


def _wait_answered(server: Served) -> None:
    """The gateway says 503 while there is no controller."""
    answered = httpx.Client(transport=httpx.HTTPTransport(retries=3), base_url=server.url, timeout=WITHIN_S)
    with answered:
        while answered.get("/v1/admin/status").status_code == 503:
            continue  # each answer takes as long as the gateway tries


def test_killed_scheduler_comes_back_with_a_new_term(server: Served) -> None:
    expected, scheduler = tokens(server), server.status()["scheduler"]
    os.kill(scheduler["pid"], signal.SIGKILL)
    server.wait_for_status(
        lambda document: (
            is_whole(document)
            and document["scheduler"]["incarnation"] == scheduler["incarnation"] + 1
            and document["gateways"][0]["state"] == "ready"
        ),
        WITHIN_S,
    )
    assert tokens(server) == expected


def test_ended_cluster_leaves_nothing_behind(server: Served) -> None:
    """Last of this cluster: SIGTERM drains, exits 0, and no process, socket, segment or folder is left."""
    processes = family(server)
    sockets = sockets_of(processes)
    assert len(sockets) >= 5, "controller, scheduler, gateway, two expert workers"
    folder = server.folder()
    assert folder.is_dir()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WITHIN_S) == 0, server.log
    assert "draining" in server.log
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.grpc_port))
    _, alive = psutil.wait_procs(processes, WITHIN_S)
    assert not alive
    assert not sockets & set(listed_sockets().values())
    assert not folder.exists()


def test_worker_that_cannot_start_ends_serve_with_its_own_reason(tiny: Path, tmp_path: Path) -> None:
    """What only a worker can find out: serve says why, exits 1 and leaves nothing."""
    before, config = folders(), tmp_path / "config.yaml"
    config.write_text("cluster: {span: hosts, restarts_max: 1}\n")  # whose memory serve cannot know
    served = Served(tiny, "--config", str(config), "--kv-memory", "1KB", log=tmp_path / "log")
    with pytest.raises(AssertionError, match=r"attention-0 failed: attention.kv_bytes .*: 1000"), served:
        pytest.fail("it must not become ready")
    assert served.process.returncode == 1
    assert folders() == before
