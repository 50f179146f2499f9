"""The server that attention workers send tokens to: one stream per worker, one message per step.

Tokens carry their attempt, and the ledger takes only the newest attempt's, so a worker that was only frozen
cannot speak for a sequence that has moved on. Each batch is acknowledged, so that the worker knows what has
arrived; what is refused is named in the ack, and the worker drops it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import grpc
from expertmesh.v1 import identity_pb2, step_pb2, step_pb2_grpc

from gateway import wire
from gateway.config import GatewayConfig
from gateway.errors import CannotListen, MalformedMessage
from gateway.metrics import GatewayMetrics
from gateway.port import Receiver

_log = logging.getLogger(__name__)


class TokenService(step_pb2_grpc.TokenServiceServicer):
    """`token` guards the link; `identity.token_address` is where it listens, e.g. unix-abstract:name."""

    def __init__(
        self,
        identity: wire.Identity,
        token: str,
        receiver: Receiver,
        config: GatewayConfig,
        metrics: GatewayMetrics,
    ) -> None:
        self._identity = identity
        self._token = token
        self._receiver = receiver
        self._config = config
        self._metrics = metrics
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Serve; returns the address with its port. Raises CannotListen if it is taken: no SO_REUSEPORT."""
        address = self._identity.token_address
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                # Workers ask an idle stream for a sign of life; by default gRPC takes that for abuse and cuts it.
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.max_receive_message_length", self._config.message_bytes_max),
                ("grpc.max_send_message_length", self._config.message_bytes_max),
            ]
        )
        step_pb2_grpc.add_TokenServiceServicer_to_server(self, server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise CannotListen(address, str(error)) from error
        await server.start()
        self._server = server
        return address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"

    async def stop(self, grace_s: float = 0.0) -> None:
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    async def Deliver(
        self,
        request_iterator: AsyncIterator[step_pb2.TokenBatch],
        context: grpc.aio.ServicerContext[step_pb2.TokenBatch, step_pb2.TokenAck],
    ) -> AsyncIterator[step_pb2.TokenAck]:
        if not wire.is_bearer(context.invocation_metadata() or (), self._token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: Bearer with the link token")
        async for batch in request_iterator:
            yield self.take(batch)

    def take(self, batch: step_pb2.TokenBatch) -> step_pb2.TokenAck:
        """Deliver what can be; answers with the attempts that are not wanted."""
        return step_pb2.TokenAck(refused=self._refused(batch), number=batch.number)

    def _refused(self, batch: step_pb2.TokenBatch) -> list[identity_pb2.Attempt]:
        if batch.fingerprint != self._identity.fingerprint:
            self._metrics.deltas_refused.labels("fingerprint").inc(len(batch.deltas))
            return [delta.attempt for delta in batch.deltas]
        refused = []
        for message in batch.deltas:
            try:
                is_wanted = self._receiver.deliver(wire.delta(message))
            except MalformedMessage as error:
                _log.warning("worker %s sent a malformed message: %s", batch.sender.id, error)
                self._metrics.deltas_refused.labels("malformed").inc()
                is_wanted = False
            if not is_wanted:
                refused.append(message.attempt)
        return refused
