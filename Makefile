# Everything runs inside .venv, which the first target makes.
PYTHON ?= python3
# The CPU wheel of the pinned torch is tried first: where pip's indexes have it, nothing of CUDA is fetched. An index that has
# it can be named with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check format docs dist bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(MAKE) docs

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, from docs/*.md, docstrings and --help; a broken link or reference is an error. Open build/docs/index.html.
docs: $(READY)
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env --write-all --builder html docs build/docs

# What would be uploaded: the wheel is built from the source distribution, installed where nothing else is, and used there.
dist: $(READY)
	rm -rf dist build/dist
	$(BIN)/python -m pip install --quiet -c constraints.txt build twine
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install --quiet -c constraints.txt 'torch==$(TORCH)+cpu' 2>/dev/null \
	  || build/dist/bin/python -m pip install --quiet -c constraints.txt torch
	build/dist/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd build/dist && bin/python $(CURDIR)/tools/smoke.py $(CURDIR)/assets/duotone-10m

# The bundled model on its own held-out text; appends to bench/records/accuracy.jsonl.
bench: $(READY)
	$(BIN)/duotone bench accuracy assets/duotone-10m --text assets/duotone-10m/evaluation.txt \
	  --calibration assets/duotone-10m/calibration.txt --samples 128 --seq-len 256 --eval-samples 64
	$(BIN)/python tools/render.py

# torch first and without build isolation: an isolated build ignores constraints and would fetch another torch.
# The last line says whether the compiled extension is there; without a C++ compiler everything works, slower.
$(READY): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "duotone needs Python 3.11 or newer (make PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt 'torch==$(TORCH)+cpu' numpy 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'from duotone.kernels import native; print("duotone: compiled extension:", native.unavailable() or "built")'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info src/duotone/*.so .pytest_cache .ruff_cache .hypothesis
