"""`expertmesh serve`: flags over a file become one configuration; then `cluster/serve.py` does it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from cluster.commands.sizes import parse_size_or_share
from cluster.commands.status import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from cluster.config import ConfigError, load_config

# flag -> the settings it overrides, and how to read and explain it
_SETTINGS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "--model": (("model",), "DIR", "checkpoint: config.json and safetensors"),
    "--served-name": (("served_name",), "NAME", "the model's name in the API (default: its folder's)"),
    "--attention-workers": (("pools.attention_workers",), "N", "default 1"),
    "--expert-workers": (("pools.expert_workers",), "M", "default 2"),
    "--replicas": (("pools.replicas",), "R", "expert workers that hold each expert; default 1"),
    "--transport": (("transport",), "KIND", "between the pools: auto (default), shm, grpc, nccl or cuda_ipc"),
    "--device": (("device",), "KIND", "cpu (default) or cuda, one GPU for each worker"),
    "--dtype": (("attention.dtype", "expert.dtype"), "KIND", "auto, float32 or bfloat16"),
    "--weights": (
        ("attention.weights", "expert.weights"), "HOW",
        "of an FP8 checkpoint: auto (default), dequantised or fp8 (half the memory, slower)",
    ),
    "--numerics": (
        ("attention.numerics", "expert.numerics"), "KIND",
        "exact: same tokens wherever they run (default); fast may trade that away",
    ),
    "--threads": (("attention.threads", "expert.threads"), "N", "compute threads of each worker; default 1"),
    "--microbatches": (("attention.microbatches",), "N", "slices of a step in flight: auto (default) or 1 to 4"),
    "--max-model-len": (("attention.model_len_max",), "TOKENS", "prompt and answer together"),
    "--kv-memory": (
        ("attention.kv_bytes", "attention.kv_share"), "SIZE",
        "for keys and values of each attention worker, as 2GiB, or a share of what is free for it, as 0.5 or 50%%",
    ),
    "--host": (("host",), "HOST", "default 127.0.0.1"),
    "--port": (("port",), "PORT", "REST; default 8000"),
    "--grpc-port": (("grpc_port",), "PORT", "gRPC; default 9000, 0 for none"),
    "--gateways": (("pools.gateways",), "N", "each on the ports that follow the one before; default 1"),
    "--api-key": (("gateway.api_key",), "KEY", f"clients must present it; better in ${API_KEY_VARIABLE}"),
    "--admin-key": (("gateway.admin_key",), "KEY", f"and for status, scale …; better in ${ADMIN_KEY_VARIABLE}"),
    "--tls-cert": (("gateway.tls_cert",), "FILE", "serve REST and gRPC over TLS with this certificate (PEM)"),
    "--tls-key": (("gateway.tls_key",), "FILE", "its private key (PEM)"),
    "--tls-client-ca": (("gateway.tls_client_ca",), "FILE", "clients must have a certificate signed by it (PEM)"),
    "--name": (("cluster.name",), "NAME", "tells clusters on one Ray apart"),
    "--ray-address": (("cluster.ray_address",), "ADDR", "a Ray to join (auto or host:port) instead of our own"),
}  # fmt: skip


_PREFIX_CACHE = "attention.prefix_cache"


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start a cluster and serve a model",
        description="Starts Ray (or joins one), controller, scheduler, gateway and both pools, and serves until\n"
        "Ctrl-C or SIGTERM: running requests are finished, then everything is ended. Again: at once.",
        epilog="Example:  expertmesh serve --model checkpoints/demo --expert-workers 3 --replicas 2\n"
        "          expertmesh serve --config cluster.yaml --port 8080 --print-config",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML; see --print-config for all settings")
    parser.add_argument("--print-config", action="store_true", help="print the merged configuration and end")
    parser.add_argument("--dashboard", action="store_true", help="Ray's dashboard and job server, on port 8265")
    parser.add_argument(
        "--prefix-cache", action=argparse.BooleanOptionalAction, dest=_PREFIX_CACHE,
        help=f"keep keys and values of prompts that may come again (default) [{_PREFIX_CACHE}]",
    )  # fmt: skip
    for flag, (names, metavar, explained) in _SETTINGS.items():
        shown = f"{explained} [{', '.join(names)}]"
        parser.add_argument(flag, dest=names[0], metavar=metavar, help=shown)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, _overrides(vars(arguments)))
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return 0
    from cluster.serve import (
        serve,  # here: it reads tensors' headers, and every other command starts without torch
    )

    return serve(config)


def _overrides(given: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of every flag that was given."""
    overrides: dict[str, Any] = {"cluster.dashboard": True} if given["dashboard"] else {}
    if given[_PREFIX_CACHE] is not None:
        overrides[_PREFIX_CACHE] = given[_PREFIX_CACHE]
    for name, variable in (("gateway.api_key", API_KEY_VARIABLE), ("gateway.admin_key", ADMIN_KEY_VARIABLE)):
        if key := os.environ.get(variable):
            overrides[name] = key
    for flag, (names, _, _) in _SETTINGS.items():
        value = given[names[0]]
        if value is None:
            continue
        if flag == "--kv-memory":
            try:
                overrides |= dict(zip(names, parse_size_or_share(value), strict=True))
            except ValueError as error:
                raise ConfigError(f"--kv-memory: {error}") from None
            continue
        overrides |= dict.fromkeys(names, value)
    return overrides
