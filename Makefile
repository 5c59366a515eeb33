# make demo: depth of the sample images.  make test: everything that CI runs.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
DATASETS3 := .venv-datasets3

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/python predict.py samples/*.jpg --output output
	@echo "The pictures lie in output/: open output/*_color.png"

test: .venv/.dev $(OLDEST)/.installed $(DATASETS3)/.installed lint
	$(BIN)/python -m pytest -q

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

.venv/.dev: .venv/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

# The oldest supported transformers over the rest of .venv, for a smoke test.
$(OLDEST)/.installed: .venv/.installed
	$(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(OLDEST)/shared
	cp $(OLDEST)/shared "$$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(OLDEST)/bin/python -m pip install --quiet --no-deps transformers==5.19.0
	touch $@

# datasets 3.6, the last that runs loading scripts.
$(DATASETS3)/.installed: Makefile
	$(PYTHON) -m venv $(DATASETS3)
	$(DATASETS3)/bin/python -m pip install --quiet "datasets==3.6.0" pillow scipy h5py lz4
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(DATASETS3) output .pytest_cache .ruff_cache
