# make demo: depth of the sample images, and the checkpoint's score on held-out frames.
# make test: everything that CI runs.  make test-newest: the compatibility tests on the newest releases, tested or not.
# make tiny: trains the tiny checkpoint.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
NEWEST := .venv-newest
DATASETS3 := .venv-datasets3
# What depends on the version of transformers: model, processor, pipeline, training, the lmms-eval plug-in, the README.
COMPATIBILITY := $(addprefix tests/test_,repository.py configuration.py modeling.py processing.py convert_checkpoint.py \
	predict.py train_data.py train_losses.py train_script.py train_distributed.py lmms_plugin.py)

.PHONY: demo test test-newest tiny lint clean

demo: .venv/.installed
	$(BIN)/python predict.py samples/*.jpg --output output
	$(BIN)/python -m bench build procedural --out output/held_out --split test --max-frames 100
	rm -rf output/scores
	$(BIN)/python -m bench evaluate --model . --data output/held_out --out output/scores
	@echo "The pictures lie in output/: open output/*_color.png"

test: .venv/.dev $(OLDEST)/.installed $(DATASETS3)/.installed lint
	$(BIN)/python -m pytest -q
	$(OLDEST)/bin/python -m pytest -q $(COMPATIBILITY)

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest -q $(COMPATIBILITY)

# OpenMP's threads otherwise burn what data workers need, and convolutions are compiled anew for most sizes of image.
tiny: export OMP_WAIT_POLICY = PASSIVE
tiny: export ONEDNN_PRIMITIVE_CACHE_CAPACITY = 20000
tiny: .venv/.installed
	$(BIN)/python create_tiny.py output/tiny/start
	$(BIN)/python -m bench build procedural --out output/tiny/data --split train --num-proc 2
	$(BIN)/python -m bench build procedural --out output/tiny/data --split test --num-proc 2
	rm -rf output/tiny/pretrain output/tiny/stage1 output/tiny/stage2
	for stage in pretrain stage1 stage2; do $(BIN)/torchrun --nproc-per-node 2 train_sft.py --config configs/tiny_$$stage.yaml || exit 1; done
	@echo "The checkpoint lies in output/tiny/stage2"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/.installed: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	touch $@

.venv/.dev: .venv/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -e ".[readers]" -r requirements-dev.txt -c constraints.txt
	touch $@

# The oldest supported transformers over the rest of .venv.
$(OLDEST)/.installed: .venv/.dev
	$(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" > $(OLDEST)/shared
	cp $(OLDEST)/shared "$$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth"
	$(OLDEST)/bin/python -m pip install --quiet --no-deps transformers==5.19.0
	touch $@

# The newest releases of what the model and its training build on; torch, of which a newer one takes gigabytes, as pinned.
$(NEWEST)/.installed: requirements.txt requirements-dev.txt constraints.txt
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	sed -E 's/^(transformers|trl|datasets|accelerate|peft|huggingface_hub)[<>=][^ ]*/\1/' requirements.txt > $(NEWEST)/requirements.txt
	grep -E '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet -r $(NEWEST)/requirements.txt pytest -c $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# datasets 3.6, the last that runs loading scripts.
$(DATASETS3)/.installed: Makefile
	$(PYTHON) -m venv $(DATASETS3)
	$(DATASETS3)/bin/python -m pip install --quiet "datasets==3.6.0" pillow scipy h5py lz4
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(NEWEST) $(DATASETS3) output .pytest_cache .ruff_cache
