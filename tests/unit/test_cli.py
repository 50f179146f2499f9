"""The command line: it teaches, it refuses by name, and its exit codes mean something. Nothing is started."""

from __future__ import annotations

import http.server
import itertools
import json
import shutil
import socket
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from cluster.cli import main
from cluster.commands.sizes import parse_size, parse_size_or_share, show_size
from cluster.config import load_config
from cluster.preflight import PreflightError, RoleBytes, check, check_memory, role_bytes
from cluster.version import VERSION
from gateway.keys import hashed
from model.checkpoint import ROUTER_SUFFIXES, Checkpoint, attention_tensor_names
from model.device import HOST
from model.exact import bytes_kept

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    assert main(["make-checkpoint", "--preset", "tiny", "--out", str(folder)]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "serve",
        "status",
        "scale",
        "drain",
        "rebalance",
        "trace",
        "make-checkpoint",
        "bench",
        "bench transport",
        "bench decode",
        "bench scheduler",
        "bench serving",
    ],
)
def test_help_of_every_command_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert f"Example: expertmesh {command}" in " ".join(capsys.readouterr().out.split())


def test_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_print_config_is_yaml_with_flags_over_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("model: somewhere\nport: 1234\n")
    assert main(["serve", "--config", str(file), "--kv-memory", "2GiB", "--threads", "2", "--print-config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["model"], tree["port"]) == ("somewhere", 1234)
    assert (tree["attention"]["kv_bytes"], tree["attention"]["kv_share"]) == (2 << 30, 0)
    assert (tree["attention"]["threads"], tree["expert"]["threads"]) == (2, 2)


def test_api_key_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a command line every user of the machine could read it."""
    monkeypatch.setenv("EXPERTMESH_API_KEY", "sesame")
    assert main(["serve", "--model", "m", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["gateway"]["api_key"] == hashed("sesame")
    assert "sesame" not in shown


def test_dtype_and_numerics_are_one_choice_for_both_pools(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "m", "--dtype", "float32", "--numerics", "fast", "--print-config"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert {tree[pool]["dtype"] for pool in ("attention", "expert")} == {"float32"}
    assert {tree[pool]["numerics"] for pool in ("attention", "expert")} == {"fast"}


def test_the_prefix_cache_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, is_on in (([], True), (["--no-prefix-cache"], False), (["--prefix-cache"], True)):
        assert main(["serve", "--model", "m", *flags, "--print-config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["attention"]["prefix_cache"] is is_on


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "0"], "port: '0'; accepted: greater than or equal to 1"),
        (["--device", "tpu"], "device: 'tpu'; accepted: 'cpu' or 'cuda'"),
        (["--replicas", "3"], "replicas 3 must not exceed expert_workers 2"),
        (["--kv-memory", "2 parsecs"], "--kv-memory: '2 parsecs'; accepted: a number with B, KB"),
        (["--kv-memory", "130%"], "--kv-memory: '130%'; accepted: a share of what is free above 0 and up to 1.0"),
        (["--kv-memory", "1KB"], "attention.kv_bytes (--kv-memory): 1000; accepted: at least"),
        (["--kv-memory", "300TB"], "a --kv-memory of at most"),
        (["--kv-memory", "100KB", "--max-model-len", "1024"], "(--max-model-len): 1024; accepted: at most"),
        (["--config", "absent.yaml"], "absent.yaml: unreadable"),
        (["--max-model-len", "100000"], "100000; accepted: at most 1024"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_started(
    flags: list[str], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "serve", "--model", str(checkpoint), *flags)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("transport --kinds shm,pigeon", "--kinds: 'pigeon'; accepted: local, shm, grpc"),
        ("transport --kinds nccl", "--kinds: 'nccl'; accepted: local, shm, grpc, faulty:shm:name=value,..."),
        ("transport --kinds faulty:KIND", "--kinds: 'faulty:KIND'; accepted: local, shm, grpc, faulty:shm:"),
        (
            "transport --kinds faulty:shm:loss=2,delay_s=1",
            "--kinds: 'faulty:shm:loss=2,delay_s=1': loss: 2.0; must be",
        ),
        ("transport --kinds faulty:shm:weather=3", "'weather=3'; must be name=value, the name one of seed, loss"),
        ("transport --rows 8,0", "--rows: '0'; accepted: whole numbers from 1 to 4096"),
        ("transport --dtype int8", "--dtype: 'int8'; accepted: bfloat16, float32"),
        ("decode --topologies 1x2,2y2", "--topologies: '2y2'; accepted: AxE"),
        ("decode --batches 8,8", "--batches: 2 values; accepted: at most 32, none twice"),
        ("decode --numerics slow", "--numerics: 'slow'; accepted: exact, fast"),
        ("serving --parts prefix,magic", "--parts: 'magic'; accepted: interruption, prefix, overload, trace"),
        ("serving --parts trace", "--trace: None; accepted: a file, together with trace among --parts"),
        ("serving --rounds 0", "--rounds: '0'; accepted: whole numbers from 1"),
    ],
)
def test_a_benchmark_refuses_bad_values_before_it_starts(
    argv: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "bench", *argv.split())


def test_a_benchmark_of_more_tokens_than_the_model_allows_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", "--model", str(checkpoint), "--context", "2000"]) == 1
    assert "accepted: at most 1024" in capsys.readouterr().err


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_cuda_without_cuda_is_refused_with_what_was_found(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "serve", "--model", str(checkpoint), "--device", "cuda")
    assert (
        f"device (--device): 'cuda', but torch {torch.__version__} is built without CUDA; accepted: cpu" in message
    )
    assert len(message.splitlines()) == 1


def test_no_model_is_refused_with_the_flag_that_gives_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model: none given" in refused(capsys, "serve")


def test_missing_checkpoint_is_refused_by_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "nowhere") in refused(capsys, "serve", "--model", str(tmp_path / "nowhere"))


def test_truncated_shard_is_refused_by_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused(capsys, "serve", "--model", str(broken))
    assert shard.name in message
    assert "truncated" in message


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_occupied_port_is_refused_by_number(
    flag: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        port, free = str(taken.getsockname()[1]), str(other.getsockname()[1])
        other.close()
        flags = {"--port": free, "--grpc-port": free, flag: port}
        assert f"127.0.0.1:{port}: the port is in use" in refused(
            capsys, "serve", "--model", str(checkpoint), *itertools.chain(*flags.items())
        )


def test_more_weights_than_memory_is_refused_with_the_sum() -> None:
    """Replicas count for experts, workers for attention; a fitting cluster is accepted."""
    flags = {"model": "m", "pools.attention_workers": 2, "pools.expert_workers": 4, "pools.replicas": 2}
    config = load_config(None, flags)
    weights = RoleBytes(attention=1024 * MIB, experts=2048 * MIB)
    check_memory(config, weights, available=10_240 * MIB)
    with pytest.raises(PreflightError, match=r"memory: 6\.00 GiB available, .* experts 2 time\(s\) 4\.00 GiB"):
        check_memory(config, weights, available=6144 * MIB)


def test_weights_are_counted_as_they_are_served(checkpoint: Path) -> None:
    """Not as they are stored: float32 weights served as bfloat16 take half."""
    opened = Checkpoint.open(checkpoint)
    names = attention_tensor_names(opened.config)
    stored, router = opened.nbytes(names), opened.nbytes(name for name in names if name.endswith(ROUTER_SUFFIXES))
    assert opened.config.dtype == "float32"
    wide, half = (role_bytes(opened, d, "dequantised", "dequantised") for d in (torch.float32, torch.bfloat16))
    assert wide.attention == stored
    assert half.attention == bytes_kept((stored - router) // 4, torch.bfloat16, HOST) + router


def test_links_are_made_wide_enough_for_the_largest_step(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = {"model": str(checkpoint), "port": port, "grpc_port": 0, "router.link_bytes_max": 4096}
    config = load_config(None, flags)
    fitted, facts = check(config)
    assert fitted.router.link_bytes_max >= 2 * 512 * 2 * 64 * 4  # rows x experts per row x hidden x float32
    assert (facts.num_layers, facts.num_experts, facts.context) == (3, 8, 1024)


def test_step_larger_than_a_dispatch_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PreflightError, match=r"scheduler.step_tokens_max: 512; .* router.rows_max, 100"):
        check(load_config(None, {"model": str(checkpoint), "router.rows_max": 100}))


def test_checkpoint_is_not_overwritten_unless_forced(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-checkpoint", "--preset", "tiny", "--out", str(checkpoint)]) == 1
    assert str(checkpoint) in capsys.readouterr().err
    assert main(["make-checkpoint", "--preset", "tiny", "--out", str(checkpoint), "--force"]) == 0


DOCUMENT = {
    "model": "tiny", "phase": "ready", "epoch": {"term": 1, "number": 2}, "transport": "shm", "uptime_s": 5.0,
    "workers": [
        {"id": "expert-0", "state": "loading", "pid": 7, "incarnation": 2, "device": "cpu", "slots": 12,
         "bytes_loaded": MIB, "bytes_total": 2 * MIB, "bytes_kept": MIB, "kept_as": "fp8",
         "detail": "loading experts", "gauges": {}},
        {"id": "expert-1", "state": "ready", "pid": 8, "incarnation": 1, "device": "cpu", "slots": 12,
         "detail": "", "bytes_loaded": 2 * MIB, "bytes_total": 2 * MIB, "bytes_kept": 4 * MIB,
         "kept_as": "bfloat16", "gauges": {}},
        {"id": "attention-0", "state": "ready", "pid": 9, "incarnation": 1, "device": "cpu", "slots": 0,
         "bytes_loaded": MIB, "bytes_total": MIB, "bytes_kept": MIB, "kept_as": "bfloat16", "detail": "",
         "gauges": {"kv_blocks_total": 96.0, "kv_blocks_free": 64.0, "kv_blocks_cached": 20.0,
                    "kv_block_bytes": 8192.0, "kv_free_bytes": 4.0 * MIB, "kv_bytes": 1.03125 * MIB,
                    "kv_share": 0.2578, "kv_tokens": 3072.0, "kv_model_len": 1024.0,
                    "kv_model_len_sequences": 2.4, "kv_sliding_blocks_total": 12.0,
                    "kv_sliding_blocks_free": 7.0, "kv_sliding_blocks_cached": 4.0,
                    "kv_sliding_block_bytes": 24576.0}},
    ],
    "scheduler": {"gauges": {"running": 3.0, "waiting": 1.0}},
    "balance": {"imbalance": 1.2, "loads": {"expert-0": 30.0, "expert-1": 20.0},
                "preparing": {"term": 1, "number": 3}},
    "gateways": [{"id": "gateway-0", "address": "http://127.0.0.1:8000", "state": "ready"}],
    "scaling_failed": "expert-1: its memory is full",
    "failures": [{"id": "expert-0", "incarnation": 1, "reason": "silent for 5.1 s", "ago_s": 9.0}],
}  # fmt: skip


class Gateway(http.server.BaseHTTPRequestHandler):
    """Answers as a gateway with the key `sesame` does."""

    def do_GET(self) -> None:
        has_key = self.headers["Authorization"] == "Bearer sesame"
        body = DOCUMENT if has_key else {"error": {"message": "the API key is missing"}}
        self.send_response(200 if has_key else 401)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Not into the test's output."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_status_json_is_the_gateways_document(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", url, "--api-key", "sesame", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DOCUMENT


def test_status_for_people_shows_workers_and_what_was_lost(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["status", "--url", url, "--api-key", "sesame"]) == 0
    shown = capsys.readouterr().out
    assert "attention-0: keys and values 64 of 96 blocks free, 20 cached, 8.0 KiB each, in windows" in shown
    words = " ".join(shown.split())
    assert " 7 of 12 blocks free, 4 cached, 24.0 KiB each" in words
    assert (
        "attention-0: of 4.0 MiB free 25.8 % taken, 1.0 MiB = 96 x 8.0 KiB + 12 in windows x 24.0 KiB: " in words
    )
    assert "3,072 tokens fit, 2.4 sequences of 1,024" in words
    for words in (
        "ready, epoch 1.2",
        "1.0 MiB of 2.0 MiB",
        "4.0 MiB bfloat16",
        "3 running, 1 waiting",
        "silent for 5.1 s",
        "1.20 of the mean load (expert-0 60%, expert-1 40%); epoch 1.3 is being prepared",
        "not scaled: expert-1: its memory is full",
    ):
        assert words in shown


def test_status_without_the_key_says_so(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPERTMESH_API_KEY", raising=False)
    assert main(["status", "--url", url]) == 1
    assert "answers 401: the API key is missing" in capsys.readouterr().err


def test_status_names_the_url_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert f"http://127.0.0.1:{port} cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("2GiB", (2 << 30, 0.0)),
        ("1", (1, 0.0)),
        ("0.5", (0, 0.5)),
        ("50%", (0, 0.5)),
        ("1.0", (0, 1.0)),
        ("5 %", (0, 0.05)),
    ],
)
def test_memory_is_a_size_or_a_share(text: str, amount: tuple[int, float]) -> None:
    assert parse_size_or_share(text) == amount


@pytest.mark.parametrize("text", ["0%", "0.0", "1.5", "101%", "half"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: "):
        parse_size_or_share(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1.5 g", 3 << 29), ("1048576", 1 << 20), ("7kb", 7000)],
)
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "2GX", "1e9"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: a number with"):
        parse_size(text)


def test_sizes_are_shown_short() -> None:
    assert [show_size(size) for size in (0, 1023, 1536, 3 << 29)] == ["0 B", "1023 B", "1.5 KiB", "1.5 GiB"]
