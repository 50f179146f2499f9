"""Promises of the tree: generated code is fresh, files and functions stay short, tests never sleep."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ["attention_workers", "cluster", "expert_workers", "gateway", "model", "router", "tests", "benchmarks"]
SOURCES = [p for folder in OURS for p in sorted((ROOT / folder).rglob("*.py"))]


def test_generated_code_is_fresh(tmp_path):
    """Whoever changes a .proto runs `make proto`."""
    protos = sorted((ROOT / "proto/expertmesh/v1").glob("*.proto"))
    outs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outs, *protos], check=True)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(made) == 3 * len(protos)
    for file in made:
        assert (tmp_path / file).read_text() == (ROOT / "proto" / file).read_text(), f"{file} is stale"


def test_proto_is_no_package():
    """A package named proto breaks Ray's dependencies (decision 1)."""
    assert not (ROOT / "proto/__init__.py").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", [p for p in SOURCES if "tests" in p.parts], ids=lambda p: p.stem)
def test_tests_do_not_sleep(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c for c in calls if ast.unparse(c.func) == "time.sleep"]
