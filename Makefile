# `make` lists the targets. Every target sets up .venv first when the pins changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements/cpu.lock pyproject.toml | sha256sum | cut -c1-16)
STARTED := $(shell date +%s)
PROTOS := $(wildcard protos/*/v1/*.proto)
PACKAGES := edge_node central protos lorikeet examples benchmarks docs
MODEL ?= quickstart
SEED ?= 0
SIZE ?= full
KEEP ?=
NODES ?= 50
export TORCH_INDEX

# One thread a process: several processes share the cores, and contended threads are 4 times slower.
export OMP_NUM_THREADS = 1

# Ray is only for Flower's simulation, so it is installed by the targets that use it.
SIMULATION := $(VENV)/.simulation-$(shell sha256sum requirements/simulation.lock | cut -c1-16)

.PHONY: help demo simulation stop test test-small test-contract test-rooms test-slow lint protos bench mutation clean install
.DEFAULT_GOAL := help

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo
	@echo "  Variables: MODEL=quickstart|smollm2 SEED=0 SIZE=full|small KEEP=1 (demo); PYTHON=python3.11;"
	@echo "  TORCH_INDEX=<address of PyTorch's CPU wheel index>, needed only where pip does not find torch's"
	@echo "  +cpu build by itself. MODEL=smollm2 is a real LLM of 135 M parameters (docs/real-model.md)."
	@echo "  On a GPU host install by hand: pip install 'lorikeet-federated[gpu]' (see README.md)."

demo: $(STAMP) ## One central and its nodes learn together; writes demo-report.json and demo-plot.png (MODEL, SEED, SIZE, KEEP)
	@$(BIN)/python -m examples.quickstart.demo --model $(MODEL) --seed $(SEED) --size $(SIZE) $(if $(filter 1,$(KEEP)),--keep) \
		--install-seconds "$$(awk -v started=$(STARTED) '{print ($$2 >= started) ? $$1 : 0}' $(STAMP))"

simulation: $(SIMULATION) ## 50 virtual nodes under `flwr run`; writes simulation-run/ (NODES)
	@$(BIN)/python -m examples.simulation.run --nodes $(NODES)

stop: ## Stops the system that `make demo KEEP=1` left running
	@$(BIN)/python -m examples.quickstart.demo --stop

test: $(STAMP) ## lint, unit, contract and integration tests (15 minutes at most on 2 cores)
	@rm -rf build/coverage && mkdir -p build/coverage
	@$(MAKE) --no-print-directory --jobs=3 test-small test-contract test-rooms
	@.ci/timed integration $(BIN)/python -m pytest -q -m "not slow and not gpu" tests/integration
	@$(BIN)/coverage combine --quiet
	@.ci/timed coverage $(BIN)/coverage report

# Contract tests mostly wait for processes, so two halves of them and the others run side by side.
test-small: $(STAMP)
	@.ci/timed lint $(MAKE) --no-print-directory lint
	@.ci/timed unit $(BIN)/coverage run -m pytest -q -m "not slow and not gpu" tests/unit tests/golden

test-contract: $(STAMP)
	@.ci/timed contract $(BIN)/coverage run -m pytest -q -m "not slow and not gpu" $(wildcard tests/contract/test_*.py)

test-rooms: $(STAMP)
	@.ci/timed contract-of-rooms $(BIN)/coverage run -m pytest -q -m "not slow and not gpu" \
		$(dir $(wildcard tests/contract/*/__init__.py))

test-slow: $(SIMULATION) ## Tests marked slow, bad input as a new user would meet it, and kill -9 of every process
	@.ci/timed slow $(BIN)/python -m pytest -q -m "slow and not gpu" tests
	@.ci/timed bad-input $(BIN)/python -m examples.quickstart.bad_input
	@.ci/timed kill $(BIN)/python -m examples.quickstart.kill_test

lint: $(STAMP) ## ruff, mypy --strict, drift of the proto stubs, proto lint, drift of the reference, docs
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	@.ci/stub-drift $(BIN)/python
	@$(BIN)/python -m tests.lint_protos
	@$(BIN)/python -m docs.generate --check
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

protos: $(STAMP) ## Generates the stubs beside protos/*/v1/*.proto again
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

bench: $(STAMP) ## Every published figure (benchmarks/), one JSON line each
	@for file in $$(grep -l __main__ benchmarks/*.py); do \
		$(BIN)/python -m benchmarks.$$(basename $$file .py) --json || exit 1; done

mutation: $(STAMP) ## Small defects that the tests of five rooms notice, by a sample (SEED); half an hour
	@$(BIN)/python -m tests.mutation --seed $(SEED)

clean: ## Removes the demo's run and report, the cached base model and tool caches; .venv too with VENV_TOO=1
	@if [ -e demo-run/processes.json ] && [ -x $(BIN)/python ]; then $(BIN)/python -m examples.quickstart.demo --stop; fi
	@rm -rf demo-run demo-run.* simulation-run demo-report.json demo-plot.png .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	@$(if $(filter 1,$(VENV_TOO)),rm -rf $(VENV))

install: $(STAMP) ## Only the set-up that the other targets start with

$(SIMULATION): $(STAMP)
	@$(BIN)/python -m pip install --no-deps --no-input --disable-pip-version-check --progress-bar off -q \
		-r requirements/simulation.lock
	@rm -f $(VENV)/.simulation-* && touch $@

$(STAMP):
	@bash requirements/install.sh $(PYTHON) $(VENV) $@
