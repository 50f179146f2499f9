"""What each tenant has been served, in tokens: whose turn it is. Pure.

Start-time fair queueing: whoever waits and has the smallest account is next, and pays what its sequence may take
at most, prompt and answer; what it did not take is given back when it ends. Who begins to wait begins no lower
than the account that was served last, so that nobody saves up by being away. Between two tenants that both keep
waiting, what was charged differs by no more than their two largest sequences; what is given back is served again.
"""

from __future__ import annotations


class Shares:
    def __init__(self, remembered_max: int) -> None:
        self._accounts: dict[str, float] = {}
        self._served = 0.0  # the account that was served last, before it paid
        self._remembered_max = remembered_max

    def account(self, tenant: str) -> float:
        return self._accounts.get(tenant, self._served)

    def enter(self, tenant: str) -> None:
        """It begins to wait."""
        self._set(tenant, max(self.account(tenant), self._served))

    def charge(self, tenant: str, num_tokens: int) -> None:
        before = self.account(tenant)
        self._served = max(self._served, before)
        self._set(tenant, before + num_tokens)

    def give_back(self, tenant: str, num_tokens: int) -> None:
        if tenant in self._accounts:
            self._accounts[tenant] -= num_tokens

    def __len__(self) -> int:
        return len(self._accounts)

    def _set(self, tenant: str, account: float) -> None:
        """Where that is one too many, keep those who are furthest ahead: they would gain by being forgotten."""
        self._accounts[tenant] = account
        if len(self._accounts) > self._remembered_max:
            ahead = sorted(self._accounts.items(), key=lambda item: (-item[1], item[0]))
            self._accounts = dict(ahead[: self._remembered_max // 2])
