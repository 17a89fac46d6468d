# `make demo` and `make test` set up what they need; nothing else has to be installed but Python, a compiler and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On a laptop without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small CPU build of torch.
TORCH_INDEX ?=
PIP_FLAGS := --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help install demo test check soak gpu-test gpu-bench gpu-e2e format protos clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## make the virtual environment

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Diptych needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --progress-bar on -e '.[serve,dev]'
	@touch $@

demo: install  ## one command: a real model answers through router, prefill, store and decode
	$(BIN)/diptych demo

# Tests of whole clusters, with many processes and faults in them, have the machine to themselves; the others run two at a time.
ALONE := tests/test_system_* tests/test_cluster_local.py tests/test_cluster_remote.py tests/test_diptych_demo.py tests/test_benchmarks_gpu_e2e.py
test: install  ## every test that this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ALONE:%=--ignore-glob='%')
	$(BIN)/python -m pytest $(ALONE)

check: install  ## ruff, mypy and the fast tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not cluster" -q

soak: install  ## 20 minutes of load while everything is killed, stopped, cut and slowed; then with a bug that it must find
	MODEL_EFFORT=20 $(BIN)/python -m pytest --timeout 1800 tests/test_kvstore_store_model.py
	PYTHONPATH=.:tests $(BIN)/python -m soak --minutes 20 --name soak
	PYTHONPATH=.:tests $(BIN)/python -m soak --minutes 20 --name soak_planted_bug --planted-bug fence

gpu-test:  ## kernels, engine, transports on a CUDA device, with that machine's own Python; FLAGS="-n 8" in parallel
	PYTHONPATH=.:tests:$$PYTHONPATH $(PYTHON) -m pytest -m gpu --noconftest -p no:cacheprovider -c tests/gpu/pytest.ini --rootdir . $(FLAGS) tests/gpu

gpu-bench:  ## the kernels against their peers on a CUDA device; FA3=path of FlashAttention-3's library, VLLM=vLLM's folder
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m benchmarks.attention_kernels $(if $(FA3),--fa3 $(FA3)) --out benchmarks/results/kernels.json
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m benchmarks.decode_linear --out benchmarks/results/decode_linear.json
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m benchmarks.sampling --out benchmarks/results/sampling.json
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m benchmarks.engine --name engine
	$(if $(VLLM),PYTHONPATH=.:$(VLLM) $(PYTHON) -m benchmarks.vllm_engine --name engine_vllm)

gpu-e2e:  ## a real cluster on this machine's GPUs: its answers checked, its times taken
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu_e2e --name gpu_e2e

format: install  ## let ruff rewrite
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

protos: install  ## generate the modules of protos/v1 anew
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/v1/*.proto

clean:  ## remove what was installed and cached
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
