# make demo | make test | make lint: each sets up .venv first, which does nothing where that is done already.
# ARGS goes on to the command:  make demo ARGS="name=demo-2 seed=1"    make test ARGS="-m 'not engine'"

# The first of these that runs and is a Python that our dependencies have wheels for.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3.11 python3 python3.12; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
# Which build of vLLM: the one for GPUs where the driver answers.
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# One more package index, for the CPU build of torch where pip's own index has CUDA builds only.
TORCH_INDEX ?=

.PHONY: setup demo test lint

setup: .venv/.setup-done

.venv/.setup-done: pyproject.toml rewards/pyproject.toml sandbox/pyproject.toml $(wildcard rlvlm/mends/torchvision_cpu.*)
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { \
		echo "rlvlm needs Python 3.11 or 3.12; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; \
		exit 1; }
	@echo "Setting up .venv with the $(EXTRA) build of vLLM: a few minutes, several GB"
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install -qq --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-e sandbox -e rewards -e ".[$(EXTRA),dev]" || { \
		echo "If pip found no torch 2.13.0+cpu, tell it PyTorch's index of CPU builds: make $(MAKECMDGOALS) TORCH_INDEX=ADDRESS"; \
		exit 1; }
	@touch $@

demo: setup
	@.venv/bin/rlvlm train recipes/tiny_demo.yaml $(ARGS) || { status=$$?; \
		[ $$status -ne 2 ] || echo 'Through make: make demo ARGS="name=demo-2 seed=1", or make demo ARGS=--resume'; \
		exit $$status; }

test: setup
	@.venv/bin/python -m pytest $(ARGS)

lint: setup
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy
	$(if $(wildcard benchmarks/*.py),@.venv/bin/mypy benchmarks)
