"""Which (layer, expert) this worker holds, by placement epoch. The only state an expert worker has."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from model.checkpoint import Checkpoint, expert_tensor_names, expert_weight_names
from model.exact import Numerics
from model.experts import Expert
from model.linear import Keep
from model.memory import bytes_in_memory
from router.placement import EpochId, Member, Placement


class Residency:
    """Slots are filled by `prepare` in the background and freed by `retire`; `layer` is read by the compute loop.

    A layer's table is replaced, never changed in place, so that a reader's view of it holds. Two threads write:
    the lock keeps a load and a retirement from undoing one another.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        member: Member,
        dtype: torch.dtype,
        numerics: Numerics,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.member = member
        self.device = device
        self.dtype = dtype
        self.numerics = numerics
        self.bytes_loaded = 0
        self.bytes_total = 0
        self.oldest_epoch = EpochId(0, 0)  # epochs below it are retired
        self._layers: list[dict[int, Expert]] = [{} for _ in range(checkpoint.config.num_layers)]
        self._writing = threading.Lock()
        self._wanted: dict[EpochId, frozenset[tuple[int, int]]] = {}

    def layer(self, layer: int) -> dict[int, Expert]:
        """Expert id to expert; nothing for a layer the model does not have."""
        return self._layers[layer] if 0 <= layer < len(self._layers) else {}

    @property
    def num_slots_used(self) -> int:
        return sum(map(len, self._layers))

    def wanted(self, placement: Placement) -> frozenset[tuple[int, int]]:
        """What a placement asks of this worker, in any order."""
        return frozenset(pair for w in placement.workers if w.member == self.member for pair in w.experts)

    @property
    def bytes_kept(self) -> int:
        """In the device's memory."""
        return sum(expert.nbytes for table in self._layers for expert in table.values())

    @property
    def kept_as(self) -> str:
        """The dtypes held: `bfloat16`, or `bfloat16 and fp8` after memory had become short."""
        return " and ".join(sorted({expert.kept_as for table in self._layers for expert in table.values()}))

    def bytes_needed(self, placement: Placement, keep: Keep = "dequantised") -> int:
        """What `prepare` would still take of the device's memory."""
        missing = (pair for pair in self.wanted(placement) if pair[1] not in self._layers[pair[0]])
        names = (name for pair in missing for name in self._names(*pair))
        return bytes_in_memory(self.checkpoint, names, self.dtype, keep, self.device)

    def prepare(
        self,
        placement: Placement,
        should_stop: Callable[[], bool] = lambda: False,
        keep: Keep = "dequantised",
        rest: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Load what the placement asks for and is not here. `bytes_loaded` of `bytes_total` grows meanwhile.

        `keep`: how to hold those of them that are stored in FP8. `rest`: called after each expert, with its bytes.
        """
        wanted = self.wanted(placement)
        with self._writing:
            self._wanted[placement.epoch] = wanted  # first, so that no retirement frees what is being loaded
        missing = sorted(pair for pair in wanted if pair[1] not in self._layers[pair[0]])
        self.bytes_total = self.bytes_loaded + sum(self._nbytes(*pair) for pair in missing)
        for layer, expert in missing:
            if should_stop():
                return
            names = expert_weight_names(self.checkpoint.config, layer, expert)
            w1, w2, w3 = (self.checkpoint.weight(name, self.device) for name in names)
            loaded = Expert(w1, w3, w2, self.dtype, self.numerics, keep)
            with self._writing:
                self._layers[layer] = {**self._layers[layer], expert: loaded}
                self.bytes_loaded += self._nbytes(layer, expert)
            rest(self._nbytes(layer, expert))

    def retire(self, epoch: EpochId) -> None:
        """Free what only `epoch` and older ones held."""
        with self._writing:
            self.oldest_epoch = max(self.oldest_epoch, EpochId(epoch.term, epoch.number + 1))
            self._wanted = {e: pairs for e, pairs in self._wanted.items() if e >= self.oldest_epoch}
            kept = frozenset[tuple[int, int]]().union(*self._wanted.values())
            for layer, table in enumerate(self._layers):
                gone = [e for e in table if (layer, e) not in kept]
                freed = sum(self._nbytes(layer, e) for e in gone)
                self.bytes_loaded -= freed
                self.bytes_total -= freed
                self._layers[layer] = {e: x for e, x in table.items() if (layer, e) in kept}

    def _nbytes(self, layer: int, expert: int) -> int:
        return self.checkpoint.nbytes(self._names(layer, expert))

    def _names(self, layer: int, expert: int) -> tuple[str, ...]:
        return expert_tensor_names(self.checkpoint.config, layer, expert)
