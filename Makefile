# Everything sets itself up: `make train` and `make test` on a fresh machine need Python >= 3.10 and a network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0

# Where pip finds the CPU build of torch if the user's own pip settings do not offer one.
TORCH_PIP_ARGS ?= --index-url https://download.pytorch.org/whl/cpu

.PHONY: setup train test test-all test-newest test-torchao test-triton test-containers setup-slurm test-slurm test-hosts \
	support-matrix fault-matrix optimizer-table step-benchmark speed-tables browser screenshots lint format wheel clean
.DEFAULT_GOAL := train

setup: $(VENV)/.installed

# torch comes first and pinned: left to other packages, pip takes several GB of CUDA libraries on any machine.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install "torch==$(TORCH)"; \
	else \
		$(BIN)/pip install "torch==$(TORCH)+cpu" 2>/dev/null || $(BIN)/pip install "torch==$(TORCH)" $(TORCH_PIP_ARGS); \
	fi
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt -e ".[train,deepspeed,dev]"
	touch $@

# The default run: a small LLaMA on real text, sharded over two processes (or over all GPUs).
# More: make train ARGS="optimizer=trion train.steps=500"
train: setup
	$(BIN)/dist-lowrank train $(ARGS)

# Two files at a time: many tests wait for processes that start.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# Also what takes long: the full flake hunt and other slow checks; and DeepSpeed in its newest version.
test-all: setup browser setup-slurm test-newest test-torchao test-triton
	$(BIN)/python -m pytest $(ARGS)

# What is built on private attributes of others, against their newest version.
test-newest: setup
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --upgrade --no-deps --no-build-isolation --target build/newest deepspeed
	PYTHONPATH=build/newest $(BIN)/python -c "import deepspeed; print('DeepSpeed', deepspeed.__version__)"
	PYTHONPATH=build/newest $(BIN)/python -m pytest -m "not slow" tests/test_deepspeed.py tests/test_deepspeed_refusals.py

# Against torchao, kept apart: where it is installed, transformers imports it in every process that builds a model.
test-torchao: setup
	$(BIN)/pip install --quiet --no-deps --target build/torchao -c constraints.txt torchao
	PYTHONPATH=build/torchao $(BIN)/python -m pytest -m slow tests/test_factored_packages.py

# Builds the Dockerfile and trains in its containers: as root on Debian, without a Docker engine.
test-containers: setup
	$(BIN)/python -m pytest tests/test_container.py $(ARGS)

# Debian's packages of Slurm, for tests that are skipped without them. No service of the machine is started.
setup-slurm: setup
	$(BIN)/python tests/cluster/slurm.py --install || echo "without Slurm: tests/test_slurm.py will be skipped"

# Jobs on a real Slurm, and runs over several hosts: as root, on network namespaces of this machine (docs/clusters.md).
test-slurm: setup-slurm
	$(BIN)/python -m pytest tests/test_slurm.py $(ARGS)

test-hosts: setup
	$(BIN)/python -m pytest tests/test_hosts.py $(ARGS)

# Triton's kernels, in its interpreter where there is no GPU; kept apart, since torch uses whatever triton it finds.
test-triton: setup
	$(BIN)/pip install --quiet --no-deps --target build/triton triton==3.5.1
	PYTHONPATH=build/triton $(BIN)/python -m pytest tests/test_triton_kernels.py tests/test_triton_step.py

# All tables of docs/speed.md; on a quiet machine about half an hour, most of it for others' steps.
speed-tables: step-benchmark
	$(PEERS) $(BIN)/python benchmarks/optimizer_step.py $(STEP_ARGS) --dtype bfloat16 --write
	$(BIN)/python benchmarks/end_to_end.py --write
	$(BIN)/python benchmarks/step_collectives.py --write
	$(BIN)/python benchmarks/scaling.py --write
	if command -v nvidia-smi >/dev/null 2>&1; then \
		$(PEERS) $(BIN)/python benchmarks/optimizer_step.py --sizes 7b --layers 1 --dtype bfloat16 --device cuda --write \
		&& $(BIN)/python benchmarks/end_to_end.py --device cuda --model llama_60m --precision bf16 --write \
		&& $(BIN)/python benchmarks/end_to_end.py --device cuda --model llama_350m --precision bf16 --write; \
	fi

# Times single steps on the matrices of LLaMA models beside those of others. The packages of others are kept apart:
# transformers imports torchao and bitsandbytes, of which galore-torch asks, wherever they are installed. Note that
# apollo-torch's licence forbids commercial use.
PEERS := PYTHONPATH=build/peers
STEP_ARGS := --layers 2 --seconds 15

step-benchmark: setup
	$(BIN)/pip install --quiet --no-deps --target build/peers -c constraints.txt \
		torchao galore-torch apollo-torch bitsandbytes
	$(PEERS) $(BIN)/python benchmarks/optimizer_step.py $(STEP_ARGS) --write $(ARGS)

# Runs the tests that say what runs exactly where, and writes their table into the README.
support-matrix: setup
	$(BIN)/python -m pytest --support-matrix $(ARGS)

# Runs every fault in every phase, and writes what happened into docs/faults.md.
fault-matrix: setup
	$(BIN)/python -m pytest --fault-matrix tests/test_fault_matrix.py $(ARGS)

# A headless browser for the test that looks at TensorBoard, which is skipped without one. Debian's needs root.
browser: setup
	@command -v chromium || command -v google-chrome || apt-get install -y --no-install-recommends chromium || \
		echo "no browser: install chromium, as root: apt-get install chromium"

# Trains small models and takes the pictures of docs/tensorboard.md from TensorBoard, five minutes.
screenshots: setup browser
	$(BIN)/python tests/screenshots.py $(ARGS)

# Trains the default model with every optimizer, a quarter of an hour, and writes the table of docs/optimizers.md.
optimizer-table: setup
	$(BIN)/python benchmarks/optimizers.py $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run docker/*.sh
	$(BIN)/yamllint --strict .
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
