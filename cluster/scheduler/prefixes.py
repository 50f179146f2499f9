"""Which prefixes a worker has cached, as far as the scheduler knows. Pure.

Hints only: blocks, their eviction and every hit are the workers' own. A wrong hint sends a sequence where it must
be computed after all, and costs time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from attention_workers import prefix_names
from cluster.scheduler.events import Submission, WorkerReported


class Prefixes:
    """Hints of the blocks at one worker: what it said, and what it was given to compute. At most `hints_max`,
    those longest unused forgotten first."""

    def __init__(self, hints_max: int) -> None:
        self._hints_max = hints_max
        self._known: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def hear(self, report: WorkerReported) -> None:
        """What came and went; all there is where it was asked for all."""
        if report.kept and report.state is not None:
            self._known.clear()
        self.expect(report.kept)
        for hint in report.evicted:
            self._known.pop(hint, None)

    def expect(self, hints: Iterable[int]) -> None:
        """These are there, or will be."""
        for hint in hints:
            self._known[hint] = None
            self._known.move_to_end(hint)
        while len(self._known) > self._hints_max:
            self._known.popitem(last=False)

    def matched(self, hints: Sequence[int]) -> int:
        """How many blocks of a prompt are there from its beginning on.

        Blocks are evicted from their sequence's end on, so a block that is there has those before it: bisected.
        """
        low, high = 0, len(hints)
        while low < high:
            middle = (low + high) // 2
            if hints[middle] in self._known:
                low = middle + 1
            else:
                high = middle
        return low


def hints_of(submission: Submission, block_tokens: int) -> Sequence[int]:
    """Of its prompt's whole blocks. Computed once for a submission, where somebody asks."""
    hints = submission.hints.get(block_tokens)
    if hints is None:
        names: list[bytes] = []
        base = prefix_names.root(submission.fingerprint, submission.cache_salt)
        prefix_names.follow(names, submission.prompt, block_tokens, base)
        hints = submission.hints[block_tokens] = [prefix_names.hint(name) for name in names]
    return hints
