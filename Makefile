# `make` explains itself. `make train` on a fresh machine sets everything up first (.ci/setup).
#
# Names and paths reach the recipes through the environment, so that those with spaces arrive whole.

JOB ?= jobs/digits.yaml
ARGS ?=
SITE ?=
MUSTER_VENV ?= .venv
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= muster
REVISION = $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
export JOB SITE MUSTER_VENV IMAGE

BIN := $(MUSTER_VENV)/bin
SITE_OPTION = $(if $(SITE),--site "$$SITE")
RENDER = "$(BIN)/muster" render "$$JOB" --on kubernetes $(SITE_OPTION) $(ARGS)
# Most tests wait for processes that they started, so there are more workers than processors.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? 2 * n : 8)))
PYTEST = "$(BIN)/pytest" --numprocesses=$(WORKERS) --no-loadscope-reorder
SCRIPTS = $(wildcard .ci/* slurm/*.sh slurm/*.sbatch docker/*.sh k8s/*.sh bench/*.sh tests/*/*.sh)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-bench train test test-unit test-cli test-gloo test-slurm test-docker test-kubernetes \
  test-gpu test-speed test-full bench bench-gpu checks slurm-submit docker-build docker-run k8s-render k8s-apply k8s-logs \
  k8s-delete clean

##@ Start here

help: ## Show this
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {print "\n" substr($$0, 5)} \
	  /^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

train: setup ## Train JOB on this machine: make train JOB=jobs/digits.yaml ARGS="parallel=dp train.epochs=3"
	@"$(BIN)/muster" run "$$JOB" $(ARGS)

setup: ## Make or update the environment, as the other targets do by themselves
	@.ci/setup

##@ Elsewhere

slurm-submit: setup ## Submit JOB to Slurm; SITE names another site file, ARGS adds key=value
	@"$(BIN)/muster" submit "$$JOB" --on slurm $(SITE_OPTION) $(ARGS)

docker-build: ## Build the container image IMAGE, and train in it for some seconds
	docker build --file docker/Dockerfile --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) --tag "$$IMAGE" .
	docker run --rm --cap-drop ALL --security-opt no-new-privileges "$$IMAGE" jobs/digits.yaml parallel=single device=cpu train.steps=50

docker-run: setup ## Train JOB in containers on this machine
	@"$(BIN)/muster" run "$$JOB" --on docker $(SITE_OPTION) $(ARGS)

k8s-render: setup ## Print the manifests of JOB
	@$(RENDER)

k8s-apply: setup ## Start JOB on the current cluster
	@$(RENDER) | kubectl apply --filename -

k8s-logs: setup ## Follow the logs of JOB's pods
	@$(RENDER) | kubectl get --filename - --output name | sed -n 's|^job.*/|app.kubernetes.io/instance=|p' | \
	  xargs -I LABEL kubectl logs --selector LABEL --prefix --follow --tail -1 --max-log-requests 1000

k8s-delete: setup ## Stop JOB and remove its objects
	@text=$$($(RENDER)); kubectl delete --ignore-not-found --filename - <<<"$$text"; \
	  awk '/^  namespace:/ {n=$$2} /instance:/ {i=$$2} /^---/ {exit} END {print "--namespace=" n, "-l=app.kubernetes.io/instance=" i}' \
	  <<<"$$text" | xargs kubectl delete configmap --ignore-not-found

##@ Develop

test: setup-dev ## Run every test that can run here; the others skip and say why
	@$(PYTEST) $(ARGS)

test-unit: setup-dev ## Run the quick tests: functions and classes, without ranks
	@$(PYTEST) tests/unit $(ARGS)

test-cli: setup-dev ## Run the tests of commands as they are typed: muster, make and set-up
	@$(PYTEST) tests/cli $(ARGS)

test-gloo: setup-dev ## Run the tests with real ranks on CPU
	@$(PYTEST) tests/gloo $(ARGS)

test-slurm: setup-dev ## Run the tests on a real Slurm; as root, install what it needs first
	@MUSTER_INSTALL=1 "$(BIN)/pytest" tests/slurm $(ARGS)

test-docker: setup-dev ## Run the tests on a real container engine
	@"$(BIN)/pytest" tests/docker $(ARGS)

test-kubernetes: setup-dev ## Run the tests with the real kubectl, and with pods as real containers
	@$(PYTEST) tests/kubernetes $(ARGS)

test-gpu: setup-dev ## Run the tests that need an NVIDIA GPU
	@"$(BIN)/pytest" tests/gpu $(ARGS)

test-speed: setup-dev ## Check limits on time, on a machine that does nothing else
	@"$(BIN)/pytest" -m speed $(ARGS)

test-full: setup-dev ## Kill, stop and restart as often as a release asks for, MUSTER_SEED chooses: an hour
	@MUSTER_FULL=1 "$(BIN)/pytest" --timeout=3600 $(shell grep -lw FULL tests/gloo/test_*.py tests/slurm/test_*.py) $(ARGS)

checks: setup-dev ## Check format, style, types and shell scripts
	@"$(BIN)/ruff" format --check . && "$(BIN)/ruff" check .
	@"$(BIN)/mypy" && "$(BIN)/lint-imports" --no-cache --no-logo
	@"$(BIN)/shellcheck" $(SCRIPTS) && "$(BIN)/yamllint" --strict $(wildcard jobs slurm docker k8s)

bench: setup-bench ## Measure loop, start, Slurm, recovery, checkpoints, data, DDP, scale and meetings; draw the results
	@for part in loop launch slurm recovery checkpoint data ddp scale meeting plots; do "$(BIN)/python" "bench/$$part.py"; done

bench-gpu: setup-bench ## Measure a language model on this machine's GPU against a hand-written loop
	@"$(BIN)/python" bench/gpu.py $(ARGS)

clean: ## Remove caches and build output; runs and the environment stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -not -path '*/.venv*' -prune -exec rm -rf {} +

setup-dev:
	@.ci/setup dev

setup-bench:
	@.ci/setup dev bench
