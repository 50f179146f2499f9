"""How FP8 weights are held follows from memory, and what is reckoned is what is then taken."""

from __future__ import annotations

import threading

import pytest
import torch

from attention_workers.attention_model import AttentionModel
from cluster.config import load_config
from cluster.preflight import PreflightError, RoleBytes, fit_memory, memory_needed, role_bytes
from expert_workers.config import ExpertConfig
from expert_workers.residency import Residency
from expert_workers.service import ExpertService
from model.checkpoint import Checkpoint, attention_tensor_names
from model.device import HOST
from model.linear import Keep
from model.memory import bytes_in_memory, choose
from model.synthetic import Variant, make_checkpoint
from router.config import RouterConfig
from router.membership import Failed, MemberEvent, Prepared
from router.placement import EpochId, Member, Placement, spread

ME = Member("e0", 1)
KV_BYTES = 1 << 20


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("memory") / "tiny"
    make_checkpoint("tiny", path)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("memory") / "fp8"
    make_checkpoint("tiny", path, variant=Variant(fp8=True))
    return Checkpoint.open(path)


def placement(checkpoint: Checkpoint, number: int = 1, experts: int = 8) -> Placement:
    """The first `experts` of every layer, all on one worker."""
    shape = checkpoint.config
    return spread(EpochId(1, number), checkpoint.fingerprint, [(ME, "@e0")], shape.num_layers, experts, 1)


WAYS = [
    ("fp8", torch.bfloat16),
    ("fp8", torch.float32),
    ("dequantised", torch.bfloat16),
    ("dequantised", torch.float32),
]


@pytest.mark.parametrize(("keep", "dtype"), WAYS, ids=str)
def test_expert_workers_take_what_was_reckoned(fp8: Checkpoint, keep: Keep, dtype: torch.dtype) -> None:
    residency = Residency(fp8, ME, dtype, "exact", HOST)
    reckoned = residency.bytes_needed(placement(fp8), keep)
    residency.prepare(placement(fp8), keep=keep)
    assert residency.bytes_kept == reckoned > 0
    assert residency.bytes_needed(placement(fp8), keep) == 0
    assert residency.bytes_loaded == residency.bytes_total, "which counts bytes as stored, however they are held"
    assert residency.kept_as == ("fp8" if keep == "fp8" else str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(("keep", "dtype"), WAYS, ids=str)
def test_attention_workers_take_what_was_reckoned(fp8: Checkpoint, keep: Keep, dtype: torch.dtype) -> None:
    """But for norms, a few KB."""
    model = AttentionModel(
        fp8, device=HOST, dtype=dtype, numerics="exact", positions_max=64, progress=lambda *_: None, keep=keep
    )
    names = attention_tensor_names(fp8.config)
    norms = fp8.nbytes(name for name in names if "norm" in name or "bias" in name)
    assert 0 < bytes_in_memory(fp8, names, dtype, keep, HOST) - model.bytes_kept <= norms
    assert model.bytes_loaded == fp8.nbytes(names)


def test_auto_takes_the_faster_way_while_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.memory.available_bytes", lambda _device: 1000)
    assert [choose("auto", need, HOST) for need in (999, 1000, 1001)] == ["dequantised", "dequantised", "fp8"]
    assert (choose("fp8", 1, HOST), choose("dequantised", 10**9, HOST)) == ("fp8", "dequantised")


def prepared(
    service: ExpertService, events: list[MemberEvent], happened: threading.Event, table: Placement
) -> None:
    happened.clear()
    service.prepare(table)
    assert happened.wait(30)
    assert events[-1] == Prepared(table.epoch), events


def test_a_worker_that_runs_short_keeps_what_comes_later_in_fp8(
    fp8: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A survivor that takes over a lost worker's experts is not refused for holding its own the faster way."""
    events: list[MemberEvent] = []
    happened = threading.Event()
    service = ExpertService(
        fp8.path,
        ME,
        "t",
        ExpertConfig(),
        RouterConfig(),
        "shm",
        "127.0.0.1",
        "cpu",
        1.0,
        lambda e: (events.append(e), happened.set())[0],
    )
    service.start()
    try:
        prepared(service, events, happened, placement(fp8, 1, experts=2))
        assert service.health().kept_as == "float32"
        first = service.health().bytes_kept
        probe = Residency(fp8, ME, torch.float32, "exact", HOST)
        probe.prepare(placement(fp8, 1, experts=2))
        short = probe.bytes_needed(placement(fp8), "dequantised") - 1
        monkeypatch.setattr("model.memory.available_bytes", lambda _device: short)
        prepared(service, events, happened, placement(fp8, 2))
        assert service.health().kept_as == "float32 and fp8"
        assert first < service.health().bytes_kept < first + short
    finally:
        service.stop(10)


def test_a_worker_told_to_dequantise_refuses_rather_than_disobey(
    fp8: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.memory.available_bytes", lambda _device: 10_000)
    events: list[MemberEvent] = []
    happened = threading.Event()
    config = ExpertConfig(weights="dequantised")
    service = ExpertService(
        fp8.path,
        ME,
        "t",
        config,
        RouterConfig(),
        "shm",
        "127.0.0.1",
        "cpu",
        1.0,
        lambda e: (events.append(e), happened.set())[0],
    )
    service.start()
    try:
        service.prepare(placement(fp8))
        assert happened.wait(30)
    finally:
        service.stop(10)
    [failed] = events
    assert isinstance(failed, Failed)
    assert "expert weights need" in failed.detail


# --- before anything is started ----------------------------------------------------------------------


def needed(checkpoint: Checkpoint, attention: Keep, experts: Keep) -> int:
    config = load_config(None, {"model": "m", "attention.kv_bytes": KV_BYTES})
    return sum(memory_needed(config, role_bytes(checkpoint, torch.float32, attention, experts)))


def ways(checkpoint: Checkpoint, available: int, **settings: str) -> tuple[str, str]:
    flags: dict[str, object] = {f"{role}.weights": way for role, way in settings.items()}
    flags["attention.kv_bytes"] = KV_BYTES
    config = fit_memory(load_config(None, {"model": "m", **flags}), checkpoint, available)
    assert config.attention.kv_free_bytes >= KV_BYTES
    return config.attention.weights, config.expert.weights


def test_experts_are_kept_in_fp8_first(fp8: Checkpoint) -> None:
    """`auto` stays where all fits, and becomes fp8 where it must, of attention last."""
    everything, experts, both = (
        needed(fp8, *how) for how in (("dequantised",) * 2, ("dequantised", "fp8"), ("fp8",) * 2)
    )
    assert both < experts < everything
    assert ways(fp8, everything) == ("auto", "auto")
    assert ways(fp8, everything - 1) == ways(fp8, experts) == ("auto", "fp8")
    assert ways(fp8, experts - 1) == ways(fp8, both) == ("fp8", "fp8")
    with pytest.raises(PreflightError, match=r"memory: .* needed"):
        ways(fp8, both - 1)


def test_what_was_chosen_is_kept_to(fp8: Checkpoint) -> None:
    everything, experts = needed(fp8, "dequantised", "dequantised"), needed(fp8, "dequantised", "fp8")
    assert ways(fp8, everything, expert="fp8") == ("auto", "fp8")
    with pytest.raises(PreflightError, match="memory"):
        ways(fp8, everything - 1, attention="dequantised", expert="dequantised")
    with pytest.raises(PreflightError, match="memory"):
        ways(fp8, experts - 1, attention="dequantised")


@pytest.mark.parametrize("role", ["attention", "expert"])
def test_what_is_not_stored_in_fp8_cannot_be_kept_so(plain: Checkpoint, role: str) -> None:
    with pytest.raises(
        PreflightError, match=rf"{role}.weights: 'fp8'; accepted: auto or dequantised, as m is not"
    ):
        ways(plain, 1 << 40, **{role: "fp8"})
    assert ways(plain, 1 << 40) == ("auto", "auto")


def test_weights_on_gpus_are_not_reckoned_with_the_hosts_memory(fp8: Checkpoint) -> None:
    """Each worker sees for itself what its GPU holds; the processes must find room here."""
    config = load_config(None, {"model": "m", "device": "cuda", "attention.kv_bytes": 1 << 40})
    processes = sum(memory_needed(config, RoleBytes(0, 0)))
    fitted = fit_memory(config, fp8, processes)
    assert (fitted.attention.weights, fitted.expert.weights) == ("auto", "auto")
    with pytest.raises(PreflightError, match="memory"):
        fit_memory(config, fp8, processes - 1)
