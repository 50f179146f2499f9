"""Routes, parcels and links between the pools."""

import os

# grpcio's older poller wakes fewer threads for a message: 459 us there and back against 572 (p50, in turns). Said here,
# because grpcio reads it when it is imported, and whoever has to do with links imports this first.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
