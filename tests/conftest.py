"""What holds for every test of the project."""

import inspect
import os

import pytest

# One compute thread unless a test asks for more: idle threads spin, and steal what their neighbours need.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that is a coroutine runs on the process's one loop."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    from tests.one_loop import run

    names = pyfuncitem._fixtureinfo.argnames
    run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
