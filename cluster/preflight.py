"""Everything that can be found wrong before a process is started: checkpoint, ports, memory, relations.

Reads the checkpoint's headers, never its tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from attention_workers.config import AttentionConfig
from attention_workers.kv_memory import kv_memory
from cluster.config import Config
from cluster.spec import CheckpointFacts
from expert_workers.config import ExpertConfig
from gateway import tls
from gateway.errors import GatewayError
from gateway.http_server import bind
from gateway.model_card import read_model_card
from model import device
from model.checkpoint import Checkpoint, attention_tensor_names, expert_tensor_names
from model.errors import ModelError
from model.linear import Keep
from model.memory import available_bytes, bytes_in_memory
from router.config import link_bytes_needed
from router.transport.cuda import GPU_KINDS, why_no_cupy

_PROCESS_BYTES = 320 << 20
"""What a process takes before it holds anything: Python, torch and Ray (measured: 300 to 340 MB)."""
_OTHER_PROCESSES = 6
"""Ray's own, controller, scheduler, gateway: together about as much as so many workers."""


class PreflightError(Exception):
    """Names the field or file, what it is and what is accepted."""


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of weights in memory, of one attention worker and of all experts once."""

    attention: int
    experts: int


def check(config: Config) -> tuple[Config, CheckpointFacts]:
    """The configuration fitted to the checkpoint, and the checkpoint's facts. Raises PreflightError."""
    try:
        if config.cluster.ray_address is None:  # all workers are here
            _check_device(config)
        checkpoint = Checkpoint.open(config.model_path)
        facts = _facts(checkpoint)
        read_model_card(
            config.model_path, name=config.model_name, fingerprint=facts.fingerprint, vocab_size=facts.vocab_size,
            context=facts.context,
        )  # fmt: skip
        fitted = _fit(config, checkpoint)
        fitted = fit_memory(fitted, checkpoint, available_bytes(device.HOST))
        tls.server_context(config.gateway)
        for one in map(config.of_gateway, range(config.pools.gateways)):
            for port in filter(None, (one.port, one.grpc_port)):
                bind(config.host, port).close()
    except (ModelError, GatewayError) as error:
        raise PreflightError(str(error)) from error
    return fitted, facts


def _check_device(config: Config) -> None:
    device.require(config.device)
    if config.transport in GPU_KINDS and (missing := why_no_cupy()):
        raise PreflightError(f"transport (--transport): {config.transport!r}, but {missing}")
    if config.device == "cuda" and (shortage := config.pools.gpu_shortage(torch.cuda.device_count())):
        raise PreflightError(shortage)


def _facts(checkpoint: Checkpoint) -> CheckpointFacts:
    model, context = checkpoint.config, checkpoint.config.max_position_embeddings
    return CheckpointFacts(checkpoint.fingerprint, model.num_layers, model.num_experts, model.vocab_size, context)


def _fit(config: Config, checkpoint: Checkpoint) -> Config:
    """Links wide enough for the largest step; refuses what no link could carry."""
    model, router, rows = checkpoint.config, config.router, config.scheduler.step_tokens_max
    if rows > router.rows_max:
        raise PreflightError(
            f"scheduler.step_tokens_max: {rows}; accepted: at most router.rows_max, {router.rows_max}"
        )
    if model.experts_per_token > router.experts_per_row_max:
        raise PreflightError(
            f"router.experts_per_row_max: {router.experts_per_row_max}; accepted: at least "
            f"{model.experts_per_token}, the experts per token of {config.model}"
        )
    if config.attention.model_len_max > model.max_position_embeddings:
        raise PreflightError(
            f"attention.model_len_max (--max-model-len): {config.attention.model_len_max}; accepted: at most "
            f"{model.max_position_embeddings}, which {config.model} allows"
        )
    element_bytes = _dtype(config, checkpoint).itemsize
    needed = link_bytes_needed(
        rows, model.experts_per_token, model.hidden_size, element_bytes, router.parcels_in_flight_max
    )
    wide = dataclasses.replace(router, link_bytes_max=max(router.link_bytes_max, needed))
    return config.model_copy(update={"router": wide})


def _dtype(config: Config, checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.config.dtype if config.attention.dtype == "auto" else config.attention.dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def fit_memory(config: Config, checkpoint: Checkpoint, available: int) -> Config:
    """Has FP8 weights kept as they are where `auto` allows it and memory asks for it, of experts first; and says
    what is then free for keys and values.

    Elsewhere `auto` stays, and each worker sees for itself. Raises PreflightError where nothing helps.
    """
    for role in ("attention", "expert"):
        if getattr(config, role).weights == "fp8" and not checkpoint.config.is_fp8:
            raise PreflightError(
                f"{role}.weights: 'fp8'; accepted: auto or dequantised, as {config.model} is not in FP8"
            )
    if config.cluster.span == "hosts":
        return config  # of whose memory nobody here knows
    if config.device == "cuda":  # weights lie on the GPUs, and each worker sees what is free on its own
        check_memory(config, RoleBytes(0, 0), available)
        return config
    dtype = _dtype(config, checkpoint)
    for attention, experts in itertools.product(_ways(config.attention), _ways(config.expert)):
        weights = role_bytes(checkpoint, dtype, attention, experts)
        if sum(memory_needed(config, weights)) <= available:
            break
    check_memory(config, weights, available)
    free_bytes = config.attention.kv_free_bytes or free_for_kv(config, weights, available)
    fitted = config.attention.model_copy(update={"kv_free_bytes": free_bytes})
    kv_memory(fitted, checkpoint.config, dtype, free_bytes, on_gpu=False)
    kept = {role: "fp8" for role, keep in (("attention", attention), ("expert", experts)) if keep == "fp8"}
    roles = {"attention": fitted, "expert": config.expert}
    return config.model_copy(
        update={
            name: role.model_copy(update={"weights": kept[name]} if name in kept else {})
            for name, role in roles.items()
        }
    )


def _ways(role: AttentionConfig | ExpertConfig) -> tuple[Keep, ...]:
    return ("dequantised", "fp8") if role.weights == "auto" else (role.weights,)


def role_bytes(checkpoint: Checkpoint, dtype: torch.dtype, attention: Keep, experts: Keep) -> RoleBytes:
    """What the roles' weights take of the host's memory if held so."""
    model = checkpoint.config
    names = (
        name
        for layer in range(model.num_layers)
        for expert in range(model.num_experts)
        for name in expert_tensor_names(model, layer, expert)
    )
    return RoleBytes(
        bytes_in_memory(checkpoint, attention_tensor_names(model), dtype, attention, device.HOST),
        bytes_in_memory(checkpoint, names, dtype, experts, device.HOST),
    )


def memory_needed(config: Config, weights: RoleBytes) -> tuple[int, int, int]:
    """Bytes on this host, where all workers are, of attention workers, experts and the processes themselves."""
    pools = config.pools
    kv_bytes = config.attention.kv_bytes if config.device == "cpu" else 0  # a share takes what is left
    attention = pools.attention_workers * (weights.attention + kv_bytes)
    processes = (pools.attention_workers + pools.expert_workers + _OTHER_PROCESSES) * _PROCESS_BYTES
    return attention, pools.replicas * weights.experts, processes


def free_for_kv(config: Config, weights: RoleBytes, available: int) -> int:
    """Bytes of this host's memory for the keys and values of one attention worker: all but the rest."""
    without = config.model_copy(update={"attention": config.attention.model_copy(update={"kv_bytes": 0})})
    return max(0, available - sum(memory_needed(without, weights))) // config.pools.attention_workers


def check_memory(config: Config, weights: RoleBytes, available: int) -> None:
    """Raises PreflightError with the sum, and what would make it smaller."""
    pools = config.pools
    attention, experts, processes = memory_needed(config, weights)
    needed = attention + experts + processes
    if needed > available:
        raise PreflightError(
            f"memory: {_gib(available)} available, {_gib(needed)} needed: {pools.attention_workers} attention "
            f"worker(s) with weights and keys and values {_gib(attention)}, experts {pools.replicas} time(s) "
            f"{_gib(experts)}, processes {_gib(processes)}; accepted: a smaller checkpoint, fewer "
            f"--attention-workers or --replicas, {_smaller(config, weights, available)}more memory"
        )


def _smaller(config: Config, weights: RoleBytes, available: int) -> str:
    """Which --kv-memory would fit, if one was given and a smaller one does."""
    fits = free_for_kv(config, weights, available) >> 20
    return f"a --kv-memory of at most {fits}MiB, or " if config.attention.kv_bytes and fits else "or "


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
