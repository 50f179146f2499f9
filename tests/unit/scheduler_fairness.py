"""What each tenant was served, as a naive model of the scheduler counts it; and the bound it must keep."""

from __future__ import annotations

from collections import defaultdict


class Fairness:
    """In tokens."""

    def __init__(self) -> None:
        self.most = 0  # the largest sequence that was served in its turn
        self._charged: dict[str, int] = defaultdict(int)
        self._out_of_turn: dict[str, int] = defaultdict(int)  # given back, or taken to go on
        self._waiting_since: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        """Of a tenant that waits: what both of the above were when it began to."""

    def in_turn(self, tenant: str, cost: int) -> None:
        self._charged[tenant] += cost
        self.most = max(self.most, cost)

    def out_of_turn(self, tenant: str, cost: int) -> None:
        self._charged[tenant] += cost
        self._out_of_turn[tenant] += cost

    def given_back(self, tenant: str, num_tokens: int) -> None:
        self._out_of_turn[tenant] += num_tokens

    def note(self, waiting: set[str]) -> None:
        """These wait now."""
        self._waiting_since = {tenant: was for tenant, was in self._waiting_since.items() if tenant in waiting}
        for tenant in waiting - self._waiting_since.keys():
            self._waiting_since[tenant] = (dict(self._charged), dict(self._out_of_turn))

    def judge(self) -> None:
        """Of two that both keep waiting, neither is served more than two sequences beyond the other, and what they
        were given back or took out of turn."""
        for a, since_a in self._waiting_since.items():
            for b, since_b in self._waiting_since.items():
                served, moved = (
                    {t: now[t] - max(was_a.get(t, 0), was_b.get(t, 0)) for t in (a, b)}
                    for now, was_a, was_b in zip((self._charged, self._out_of_turn), since_a, since_b, strict=True)
                )
                bound = 2 * self.most + moved[a] + moved[b]
                assert served[a] - served[b] <= bound, f"{a} was served {served[a]}, {b} {served[b]}"
