"""Says at the end of a run how much was compared."""

from collections import Counter

import pytest

TALLY = pytest.StashKey[Counter]()


@pytest.fixture
def grand_tally(pytestconfig):
    """What the grand test compared and what happened meanwhile, by name."""
    return pytestconfig.stash.setdefault(TALLY, Counter())


def pytest_terminal_summary(terminalreporter, config):
    tally = config.stash.get(TALLY, None)
    if tally is None:
        return
    terminalreporter.section("the grand exactness test")
    terminalreporter.line(
        f"{tally['answers']} answers under {tally['topologies']} topologies: {tally['tokens']} token ids and "
        f"{tally['logprobs']} logprobs compared bit for bit"
    )
    rest = sorted(tally.keys() - {"answers", "topologies", "tokens", "logprobs"})
    terminalreporter.line(", ".join(f"{tally[name]} {name}" for name in rest))
