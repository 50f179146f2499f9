"""One configuration: a file, flags over it, and a clear word for everything that does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.config import Config, ConfigError, load_config
from cluster.spec import CheckpointFacts, ClusterSpec, MeetingPoint


def write(folder: Path, text: str) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return file


def refused(file: Path | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(file, {"model": "demo", **flags})
    return str(error.value)


def test_defaults_are_one_attention_and_two_expert_workers_on_loopback() -> None:
    config = load_config(None, {"model": "checkpoints/demo"})
    assert (config.pools.attention_workers, config.pools.expert_workers, config.pools.replicas) == (1, 2, 1)
    assert (config.host, config.port, config.transport, config.device) == ("127.0.0.1", 8000, "auto", "cpu")
    assert config.grpc_port == 9000
    assert config.model_name == "demo"
    assert config.attention.numerics == "exact"


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 1234\npools: {expert_workers: 4}\nscheduler: {step_tokens_max: 300}\n")
    config = load_config(file, {"model": "m", "port": "99", "pools.replicas": 3})
    assert (config.port, config.pools.expert_workers, config.pools.replicas) == (99, 4, 3)
    assert config.scheduler.step_tokens_max == 300


def test_two_faces_have_two_ports_or_there_is_one_face() -> None:
    assert "grpc_port 8000 must not be port" in refused(grpc_port="8000")
    for none in ("0", 0, None):
        assert not load_config(None, {"model": "m", "grpc_port": none}).grpc_port


def test_gateways_have_ports_of_their_own_one_after_the_other() -> None:
    config = load_config(None, {"model": "m", "pools.gateways": 3})
    ports = [(one.port, one.grpc_port) for one in map(config.of_gateway, range(3))]
    assert ports == [(8000, 9000), (8001, 9001), (8002, 9002)]
    assert load_config(None, {"model": "m", "grpc_port": 0}).of_gateway(2).grpc_port == 0
    for ports in ({"grpc_port": 8002}, {"grpc_port": 7998}, {"port": 65534}):
        assert "pools.gateways 3" in refused(**{"pools.gateways": 3, **ports})


def test_printed_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    config = load_config(None, {"model": "m", "router.peers_max": 7, "attention.kv_bytes": 2**30})
    assert load_config(write(tmp_path, config.to_yaml()), {}) == config


def test_api_key_is_not_printed_but_reaches_the_processes() -> None:
    config = load_config(None, {"model": "m", "gateway.api_key": "s3cret"})
    assert "s3cret" not in config.to_yaml()
    assert "s3cret" not in repr(config)
    facts = CheckpointFacts("f00d", 2, 4, 100, 64)
    spec = ClusterSpec("ab12", "token", config, facts)
    assert ClusterSpec.from_json(spec.to_json()) == spec


def test_a_printed_configuration_has_the_same_keys(tmp_path: Path) -> None:
    """It shows hashes, and a hash is as good as the key it is of."""
    printed = load_config(None, {"model": "m", "gateway.api_key": "s3cret"})
    assert load_config(write(tmp_path, printed.to_yaml()), {}) == printed
    other = load_config(write(tmp_path, printed.to_yaml()), {"gateway.api_key": "new"})
    assert other.gateway.api_key != printed.gateway.api_key


def test_addresses_of_two_clusters_and_of_two_gateway_lives_differ() -> None:
    config, facts = load_config(None, {"model": "m"}), CheckpointFacts("f00d", 2, 4, 100, 64)
    one, other = ClusterSpec("a", "t", config, facts), ClusterSpec("b", "t", config, facts)
    addresses = {
        address
        for spec in (one, other)
        for address in (
            spec.controller_address, spec.scheduler_address,
            spec.token_address("gateway-0", 1, "10.0.0.7"), spec.token_address("gateway-0", 2, "10.0.0.7"),
        )
    }  # fmt: skip
    assert len(addresses) == 8
    assert all(address.startswith("unix-abstract:expertmesh-") for address in addresses)


def test_between_hosts_everything_meets_at_tcp_and_stays_where_it_was() -> None:
    """The deciders' addresses survive the journey as JSON; what others bind is their own node's."""
    config, facts = load_config(None, {"model": "m"}), CheckpointFacts("f00d", 2, 4, 100, 64)
    spec = ClusterSpec("a", "t", config, facts, MeetingPoint("10.0.0.1", "n1", 7001, 7002))
    assert ClusterSpec.from_json(spec.to_json()) == spec
    assert (spec.controller_address, spec.scheduler_address) == ("10.0.0.1:7001", "10.0.0.1:7002")
    assert spec.token_address("gateway-0", 1, "10.0.0.7") == "10.0.0.7:0"
    assert spec.exchange_host("10.0.0.7") == "10.0.0.7"
    on_one_host = replace(spec, meeting=None)
    assert on_one_host.exchange_host("10.0.0.7") == "127.0.0.1"
    v6 = replace(spec, meeting=MeetingPoint("fd00::1", "n1", 7001, 7002))
    assert v6.controller_address == "[fd00::1]:7001"


def test_shared_memory_between_hosts_is_refused() -> None:
    assert "accepted with cluster.span 'hosts': auto, grpc" in refused(
        **{"transport": "shm", "cluster.span": "hosts"}
    )


def test_unknown_settings_are_named_with_the_nearest_known(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\nschedler: {}\npools: {experts_workers: 2}\nrouter: {combine_timeout: 1}\n")
    message = refused(file)
    assert "schedler: unknown setting; the nearest known is 'scheduler'" in message
    assert "pools.experts_workers: unknown setting; the nearest known is 'expert_workers'" in message
    assert "router.combine_timeout: unknown setting; the nearest known is 'combine_timeout_s'" in message


def test_exchange_is_set_in_one_place_for_both_pools() -> None:
    """Two ends of a link with different limits would refuse each other."""
    assert "attention.router: unknown setting" in refused(**{"attention.router": {}})
    assert load_config(None, {"model": "m", "router.peers_max": 7}).router.peers_max == 7


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("port", 0, "port: 0; accepted: greater than or equal to 1"),
        ("port", "80a", "port: '80a'; accepted: a valid integer"),
        ("device", "tpu", "device: 'tpu'; accepted: 'cpu' or 'cuda'"),
        ("transport", "rdma", "transport: 'rdma'; accepted: 'auto', 'shm', 'grpc', 'nccl' or 'cuda_ipc'"),
        ("transport", "nccl", "transport 'nccl' carries rows between GPUs, accepted with device 'cpu': auto"),
        ("attention.dtype", "fp8", "accepted: 'auto', 'float32' or 'bfloat16'"),
        ("pools.gpus_per_worker", 2, "pools.gpus_per_worker: 2; accepted: less than or equal to 1"),
        ("pools.replicas", 3, "replicas 3 must not exceed expert_workers 2"),
        ("attention.numerics", "fast", "must be the same"),
        ("gateway.n_max", 200, "gateway.n_max 200 must not exceed scheduler.siblings_max 128"),
        ("gateway.in_flight_max", 10_000, "must not exceed gateway.link_queue_max 4096"),
        ("gateway.submit_bytes_max", 16 << 20, "must be at least 4096 below scheduler.message_bytes_max 16777216"),
        ("cluster.compute_stall_s", 5, "must be at least router.combine_total_s, 60"),
        ("cluster.loop_stall_s", 1, "must be at least three heartbeats, 3"),
        ("cluster.restart_backoff_s_max", 0.1, "restart_backoff_s_min 0.5 must not exceed"),
        ("gateway.api_key", "", "gateway.api_key"),
        ("cluster.heartbeat_s", 9, "member_deadline_s 5 must be at least three heartbeats, 27"),
        ("cluster.name", "Ünique", "cluster.name: 'Ünique'"),
        ("pools", 3, "pools: 3;"),
    ],
)
def test_bad_values_are_refused_by_field_value_and_what_is_accepted(flag: str, value: object, words: str) -> None:
    assert words in refused(**{flag: value})


def test_model_is_required_and_the_message_says_how() -> None:
    with pytest.raises(ConfigError, match=r"model: none given.*--model"):
        load_config(None, {})


@pytest.mark.parametrize(
    ("share", "workers", "found", "is_enough"),
    [(1.0, 2, 3, True), (1.0, 2, 2, False), (0.5, 2, 2, True), (0.5, 2, 1, False), (0.3, 2, 1, True),
     (0.1, 9, 1, True), (0.1, 10, 1, False), (1.0, 1, 0, False)],
)  # fmt: skip
def test_gpus_are_counted_whole(share: float, workers: int, found: int, is_enough: bool) -> None:
    """One attention worker and so many expert workers; none is split over two GPUs."""
    flags = {"device": "cuda", "pools.gpus_per_worker": share, "pools.expert_workers": workers}
    shortage = load_config(None, {"model": "m", **flags}).pools.gpu_shortage(found)
    assert bool(shortage) != is_enough
    if shortage:
        assert f"'cuda' with {found} GPU(s)" in shortage
        assert "accepted: fewer workers, a smaller pools.gpus_per_worker, or more GPUs" in shortage


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\x00"])
def test_file_that_is_no_mapping_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    assert "cluster.yaml" in refused(write(tmp_path, text))


def test_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    assert "absent.yaml: unreadable" in refused(tmp_path / "absent.yaml")


def test_every_setting_of_every_folder_can_be_printed() -> None:
    tree = yaml.safe_load(load_config(None, {"model": "m"}).to_yaml())
    assert tree.keys() == Config.model_fields.keys()
    assert tree["attention"].keys() == Config.model_fields["attention"].annotation.model_fields.keys() - {"router"}
