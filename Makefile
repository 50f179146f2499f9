# `make serve` and `make test` need nothing but Python 3.11+ and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CHECKPOINT ?= checkpoints/demo
PROTOS := $(wildcard proto/expertmesh/v1/*.proto)
# What clients speak, as it was last published; links inside a cluster may change with every build.
PUBLISHED := proto/clients.binpb
CLIENTS := $(addprefix --path proto/expertmesh/v1/,inference.proto admin.proto identity.proto)

.PHONY: setup serve test soak fuzz check proto publish clean

setup: $(VENV)/.installed

# torch first and alone: what depends on it would otherwise bring the CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

$(CHECKPOINT)/config.json: | setup
	$(BIN)/expertmesh make-checkpoint --preset demo --out $(CHECKPOINT)

serve: setup $(CHECKPOINT)/config.json
	$(BIN)/expertmesh serve --model $(CHECKPOINT) $(ARGS)

test: setup
	$(BIN)/python -m pytest

# Longer than `make test`: ten times as many topologies, 2,000 histories of a worker's blocks, 10,000 of the scheduler,
# 1,000 of whole clusters, 2,000 answers cut in all ways, 500 schemas kept to, pools that grow and shrink 50 times
# under streams, and every kind of process killed and frozen under them.
soak: setup
	$(BIN)/python -m pytest tests/equivalence/test_grand.py --topologies 500
	$(BIN)/python -m pytest tests/equivalence/test_grammars.py --schemas 500 -s
	$(BIN)/python -m pytest tests/unit/test_prefix_property.py tests/unit/test_kv_spaces.py --hypothesis-profile soak
	$(BIN)/python -m tests.unit.scheduler_soak
	$(BIN)/expertmesh simulate --seeds 0-999
	$(BIN)/python -m tests.on_ray.scaling_soak
	$(BIN)/python -m tests.on_ray.failover_soak
	$(BIN)/python -m tests.unit.parser_soak

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(PUBLISHED)

# Coverage-guided, 200,000 cases for each parser and for each of the gateway's bodies; then 20,000 to a gateway over
# sockets, and made-up cases of each endpoint. Or make fuzz ARGS="--cases 5000 --seed 7 frame".
fuzz: setup
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	OMP_NUM_THREADS=1 PYTHONPATH=.:proto $(BIN)/python -m tests.fuzz.run $(ARGS)
	PYTHONPATH=.:proto $(BIN)/python -m tests.fuzz.sockets
	PYTHONPATH=.:proto $(BIN)/python -m tests.unit.openapi_run

proto: setup
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto $(PROTOS)

# With a release: from then on `make check` holds messages to it.
publish: setup
	$(BIN)/buf build $(CLIENTS) --exclude-source-info -o $(PUBLISHED)

clean:
	rm -rf $(VENV) checkpoints .pytest_cache .mypy_cache .ruff_cache
