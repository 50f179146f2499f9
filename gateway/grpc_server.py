"""The gateway's gRPC server: one port of its own, health by service, reflection, bounds, an end in order.

Health: InferenceService serves while calls are taken, AdminService while the gateway lives; "" is the first.
When drained all turn to NOT_SERVING at once, before any connection ends.
"""

from __future__ import annotations

import asyncio

import grpc.aio
from expertmesh.v1 import admin_pb2_grpc, inference_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway import admin_service, inference_service, tls
from gateway.admin_service import AdminService
from gateway.config import GatewayConfig
from gateway.errors import PortInUse
from gateway.grpc_door import GrpcDoor
from gateway.inference_service import InferenceService
from gateway.state import GatewayState

_LOOK_S = 0.1
"""Between two looks at whether calls are taken."""


class GrpcServer:
    def __init__(self, host: str, port: int, state: GatewayState, admin: AdminService) -> None:
        """In the event loop that will run it. `port` 0 picks a free one, known once it is started."""
        self._host, self.port = host, port
        self._state = state
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._looking: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            interceptors=[GrpcDoor(state.keeper)],
            options=_options(state.config),
            maximum_concurrent_rpcs=state.config.grpc_rpcs_max,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(state), self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (inference_service.NAME, admin_service.NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> None:
        """Raises PortInUse or TlsUnusable."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            self.port = self._add_port(f"{host}:{self.port}")
        except RuntimeError as error:
            raise PortInUse(self._host, self.port) from error
        await self._tell_health()
        await self._server.start()
        self._looking = asyncio.create_task(self._look(), name="grpc-health")

    def _add_port(self, address: str) -> int:
        credentials = tls.grpc_credentials(self._state.config)
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def drain(self) -> None:
        """Tell everyone who asks that this gateway takes no more calls. What runs goes on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """No new calls; what runs has `grace_s` to end. Idempotent."""
        await self.drain()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
            self._looking = None
        await self._server.stop(grace_s)

    async def _look(self) -> None:
        was_taken = not self._state.not_ready
        while True:
            await asyncio.sleep(_LOOK_S)
            if was_taken == bool(self._state.not_ready):
                was_taken = not was_taken
                await self._tell_health()

    async def _tell_health(self) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        taken = not_serving if self._state.not_ready else serving
        for service, status in (("", taken), (inference_service.NAME, taken), (admin_service.NAME, serving)):
            await self._health.set(service, status)


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # an occupied port is an error
        ("grpc.max_receive_message_length", config.body_bytes_max),
        ("grpc.max_send_message_length", config.message_bytes_max),
        ("grpc.http2.min_ping_interval_without_data_ms", round(config.grpc_ping_s_min * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", round(config.grpc_keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.grpc_keepalive_timeout_s * 1000)),
    ]
