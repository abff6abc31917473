# Everything runs inside .venv, which the first target makes. A CPU wheel of torch is taken where pip can find one:
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS may point to it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check format bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The bundled model on its own held-out text; appends to bench/records/accuracy.jsonl.
bench: $(READY)
	$(BIN)/duotone bench accuracy assets/duotone-10m --text assets/duotone-10m/evaluation.txt \
	  --calibration assets/duotone-10m/calibration.txt --samples 128 --seq-len 256 --eval-samples 256

# torch first and without build isolation: an isolated build ignores constraints and would fetch another torch.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "duotone needs Python 3.11 or newer (make PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
