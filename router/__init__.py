"""Routes, parcels and links between the pools."""

import os

# grpcio's older poller wakes fewer threads for a message: 0.8 to 0.9 of the time there and back, seen in turns.
# Said here: grpcio reads it when it is imported, and whoever has to do with links imports this first.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
