# Everything is installed into .venv inside this folder; a second call re-uses it.
#   make demo   fine-tune a pretrained encoder without and with SMART, print both results
#   make test   run the tests          make lint   ruff and mypy

# the first of these that exists; say `make PYTHON=/path/to/python` for another
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c pass 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
READY := $(VENV)/ready

export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu lint style bench bench-count gpu-report clean

help:
	@sed -n '1,4p' Makefile
	@echo '#   make test-slow, make test-gpu, make style, make bench, make bench-count, make gpu-report, make clean'

setup: $(READY)

# The order matters: fairseq is built from source against the torch and numpy that are
# installed first, because an isolated build would fetch the newest torch with CUDA.
$(READY): pyproject.toml Makefile
	@echo "setting up $(VENV) with $(PYTHON) (about 4 minutes the first time) ..."
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and "make: PYTHON=$(PYTHON) is Python %d.%d; 3.11 or 3.12 is needed" % v)'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch==2.13.0 numpy cython "setuptools<81" wheel
	$(PIP) install -q --no-build-isolation fairseq-fixed==0.12.3.1 torchaudio==2.11.0
	$(PIP) install -q --no-build-isolation --editable ".[dev]"
	# fairseq names it and needs it for speech alone; it does not load beside this torch, and transformers would try
	$(PIP) uninstall -q --yes torchaudio
	@touch $@

# TASK and GLUE name a task of GLUE and its folder; UPDATES and SEEDS shorten or lengthen the runs
DEMO_FLAGS = $(if $(TASK),--task "$(TASK)") $(if $(GLUE),--glue "$(GLUE)") \
    $(if $(UPDATES),--updates "$(UPDATES)") $(if $(SEEDS),--seeds "$(SEEDS)")

demo: $(READY)
	@$(RUN) examples/demo/run.py $(DEMO_FLAGS)

test: $(READY)
	$(RUN) -m pytest -n 2 -m "not slow and not gpu"

test-slow: $(READY)
	$(RUN) -m pytest -n 2 -m "slow and not gpu"

# precision, workers and faults with every model on the GPU, and the tests that need one
test-gpu: $(READY)
	SMART_TEST_DEVICE=cuda $(RUN) -m pytest tests/test_precision.py tests/test_workers.py tests/test_faults.py

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

style: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# MODEL, BATCH, LENGTH, DTYPE as the options of the benchmark
BENCH_FLAGS = $(if $(MODEL),--model $(MODEL)) $(if $(BATCH),--batch $(BATCH)) \
    $(if $(LENGTH),--length $(LENGTH)) $(if $(DTYPE),--dtype $(DTYPE))

bench: $(READY)
	$(RUN) benchmarks/update_cost.py $(BENCH_FLAGS)

# launches, waits and memory on a GPU, counted without one; LENGTHS="128 512"
COUNT_FLAGS = $(if $(MODEL),--model $(MODEL)) $(if $(BATCH),--batch $(BATCH)) \
    $(if $(LENGTHS),--lengths $(LENGTHS)) $(if $(DTYPE),--dtype $(DTYPE))

bench-count: $(READY)
	$(RUN) benchmarks/count_updates.py $(COUNT_FLAGS)

# on a machine with a GPU: tests, an update's time and memory, and 60 updates of RTE, as a file to send back
# GLUE: folder with RTE and gpt2_bpe; CHECKPOINT: roberta.large/model.pt
REPORT_FLAGS = $(if $(GLUE),--glue "$(GLUE)") $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") \
    $(if $(MODEL),--model $(MODEL)) $(if $(BATCH),--batch $(BATCH)) $(if $(LENGTH),--length $(LENGTH)) \
    $(if $(DTYPE),--dtype $(DTYPE)) $(if $(UPDATES),--updates $(UPDATES)) $(if $(DEVICE),--device $(DEVICE))

gpu-report: $(READY)
	$(RUN) benchmarks/gpu_report.py $(REPORT_FLAGS)

clean:
	rm -rf $(VENV) .cache .demo build dist *.egg-info
