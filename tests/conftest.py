"""What holds for every test of the project."""

import gc
import inspect
import os

import pytest
from hypothesis import settings

# One compute thread unless a test asks for more; those that wait sleep, for a thread that spins steals the core
# that its neighbour needs (on two busy cores the tests with two threads took 60 s of CPU, and take 4).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples on every run and machine, however slow: what fails here fails there.
settings.register_profile("project", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("soak", derandomize=True, deadline=None, max_examples=2000)
settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption("--topologies", type=int, default=50, help="of the grand exactness test")
    parser.addoption(
        "--schemas", type=int, default=0, help="for the demo model to keep to; 0: a few for a tiny one"
    )


def pytest_collection_finish():
    """What is imported by now stays: looking through it for garbage took a third of a second, and tests that count
    what is left of links do that several times each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that is a coroutine runs on the process's one loop."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from tests.one_loop import run

    names = pyfuncitem._fixtureinfo.argnames
    run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
