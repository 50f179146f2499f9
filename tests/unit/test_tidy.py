"""Promises of the tree: generated code is fresh, files and functions stay short, tests never sleep."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ["attention_workers", "cluster", "expert_workers", "gateway", "model", "router", "tests", "benchmarks"]


def sources(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


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


@pytest.mark.parametrize("folder", OURS)
def test_files_and_functions_are_short(folder):
    for path in sources(folder):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_tests_do_not_sleep():
    for path in sources("tests"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            assert not (is_call and ast.unparse(node.func) == "time.sleep"), f"{path}:{node.lineno}"
