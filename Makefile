# SPDX-License-Identifier: Apache-2.0
# make demo        a pretrained model pruned, saved, loaded and compared, without a GPU
# make test        the same set-up, then all tests
# make test-vllm   then vLLM's CPU build (3 GB, in .venv-vllm) against transformers; python3 >= 3.11
#
# They make .venv by themselves and need python3 >= 3.10 with venv, g++ and make.
#   PYTHON=python3.12         the Python that .venv is made from
#   PIP_ARGS="..."            extra arguments of every pip install (an index, a wheel folder)
#   DEMO_ARGS="--short"       arguments of the demo
#   TEST_ARGS="-k pack"       arguments of pytest
#   SPENSE_CUDA_ARCHS="90a"   GPU architectures; make test takes 90a;100a where an nvcc is found
#   SPENSE_REQUIRE_CUDA=1     make test fetches a CUDA compiler where none is found, never skips
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS)
SOURCES := setup.py pyproject.toml $(shell find cmake csrc -type f)
CXX_FILES := git ls-files -z '*.h' '*.hpp' '*.cpp' '*.cu' '*.cuh'

VLLM := .venv-vllm/bin/python
VLLM_PIP := $(VLLM) -m pip install --disable-pip-version-check -q $(PIP_ARGS)

.PHONY: demo test test-vllm bench-cpu lint format clean FORCE
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(PY) -m spense_kernels.cli demo $(DEMO_ARGS)

test: .venv/.test
	SPENSE_CUDA_ARCHS="$$(cat .venv/.archs)" $(PY) -m pytest $(TEST_ARGS)

# VLLM_ARGS="--demo-checkpoint demo_out/checkpoint" adds the demo's model.
test-vllm: .venv-vllm/.test
	$(VLLM) -m pytest python_tests/engines/test_vllm.py --results bench/results/vllm.json $(VLLM_ARGS)

bench-cpu: .venv/.test
	$(PY) -m pytest bench --benchmark-only $(TEST_ARGS)

lint: .venv/.lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(CXX_FILES) | xargs -0 .venv/bin/clang-format --dry-run -Werror

format: .venv/.lint
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	$(CXX_FILES) | xargs -0 .venv/bin/clang-format -i

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info spense_kernels/lib spense_kernels/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.base: cmake/requirements-build.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "expected python3 >= 3.10 with venv (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@command -v g++ > /dev/null || { echo "expected g++ (Debian, Ubuntu: apt install g++)"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing torch and the build tools into .venv"
	$(PIP) -r cmake/requirements-build.txt
	@touch $@

# Installs the package as it stands here, with one extra, for the architectures in .venv/.archs.
define install
@echo "building the native libraries and installing what [$(1)] needs"
@set -e; export SPENSE_CUDA_ARCHS="$$(cat .venv/.archs 2>/dev/null || echo "$$SPENSE_CUDA_ARCHS")"; \
if [ -n "$$($(PY) cmake/find_cuda.py --archs)" ]; then $(PIP) -r cmake/requirements-cuda.txt; fi; \
$(PIP) -r cmake/requirements-build.txt --no-build-isolation -e ".[$(1)]"
@touch $@
endef

.venv/.demo: $(SOURCES) .venv/.base
	$(call install,demo)

.venv/.test: $(SOURCES) .venv/.base .venv/.archs
	$(call install,test)

# torchvision and its kin come as CUDA builds that do not load beside this torch; vLLM needs none.
.venv-vllm/.test: cmake/requirements-vllm.txt .venv/.test
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) -r cmake/requirements-build.txt
	$(VLLM_PIP) --prefer-binary -r cmake/requirements-build.txt -r cmake/requirements-vllm.txt
	$(VLLM) -m pip uninstall -q -y torchvision torchaudio torchcodec
	@# The same native libraries again: both environments use this tree's.
	@set -e; export SPENSE_CUDA_ARCHS="$$(cat .venv/.archs)"; \
	if [ -n "$$($(PY) cmake/find_cuda.py --archs)" ]; then $(VLLM_PIP) -r cmake/requirements-cuda.txt; fi; \
	$(VLLM_PIP) --no-build-isolation --no-deps -e .
	@touch $@

.venv/.lint: pyproject.toml .venv/.base
	$(PIP) $$($(PY) -c "import re; print(*re.findall(r'\"((?:ruff|clang-format)==[^\"]+)', open('pyproject.toml').read()))")
	@touch $@

# The architectures that the tests ask for; written anew only when they change.
.venv/.archs: FORCE | .venv/.base
	@set -e; archs="$${SPENSE_CUDA_ARCHS:-90a;100a}"; \
	if [ "$$archs" != none ] && ! $(PY) cmake/find_cuda.py --nvcc 2>/dev/null | grep -q .; then \
	  if [ "$$SPENSE_REQUIRE_CUDA" = 1 ]; then $(PIP) -r cmake/requirements-nvcc.txt; \
	  else echo "CUDA part skipped: $$($(PY) cmake/find_cuda.py --nvcc 2>&1)"; archs=none; fi; \
	fi; \
	[ "$$archs" = "$$(cat $@ 2>/dev/null)" ] || echo "$$archs" > $@
