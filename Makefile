# make demo: depth of the sample images, and the checkpoint's score on held-out frames.
# make app: the web page, on this machine alone.
# make test: everything that CI runs, but for make test-slow: Ray's long tests, a job of their own there.
# make test-newest: the compatibility tests on the newest releases, tested or not.
# make test-peers: contestants of the benchmark beside their authors' code; downloads some gigabytes.
# make tiny: trains the tiny checkpoint.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
NEWEST := .venv-newest
DATASETS3 := .venv-datasets3
MOGE := .venv-moge
PEERS := .venv-peers
# What depends on the version of transformers: model, processor, pipeline, training, the lmms-eval plug-in, the README.
COMPATIBILITY := $(addprefix tests/test_,repository.py configuration.py modeling.py processing.py convert_checkpoint.py \
	predict.py handler.py app.py train_data.py train_losses.py train_script.py train_distributed.py lmms_plugin.py)

.PHONY: demo app test test-slow test-newest test-peers tiny lint clean

demo: .venv/.installed
	$(BIN)/python predict.py samples/room.jpg samples/street.jpg --output output --overwrite
	$(BIN)/python -m bench build procedural --out output/held_out --split test --max-frames 100
	rm -rf output/scores
	$(BIN)/python -m bench evaluate --model . --data output/held_out --out output/scores
	@echo "The pictures lie in output/: open output/*_color.png. What they show of the sky means nothing."

app: .venv/.app
	$(BIN)/python app.py

test: .venv/.dev $(OLDEST)/.installed $(DATASETS3)/.installed $(MOGE)/.installed lint
	$(BIN)/python -m pytest -q
	$(MOGE)/bin/python -m pytest -q tests/test_peers.py -k moge
	$(OLDEST)/bin/python -m pytest -q $(COMPATIBILITY)

test-slow: .venv/.dev
	$(BIN)/python -m pytest -q -m slow

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest -q $(COMPATIBILITY)

# UniDepth V1 alone runs with the old xformers, and Depth Anything V1 on a CPU only without one.
test-peers: export TORCH_HOME = $(abspath $(PEERS))/torch
test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m pytest -q -rs tests/test_peers.py --deselect "tests/test_peers.py::test_unidepth[v1_cnvnxtl]"
	PYTHONPATH=$(PEERS)/xformers $(PEERS)/bin/python -m pytest -q -rs "tests/test_peers.py::test_unidepth[v1_cnvnxtl]"
	@for folder in $(PEERS)/src/* $(PEERS)/torch/hub/*; do git -C $$folder log -1 --format="$$(basename $$folder) %h"; done

# OpenMP's threads otherwise burn what data workers need, and convolutions are compiled anew for most sizes of image.
tiny: export OMP_WAIT_POLICY = PASSIVE
tiny: export ONEDNN_PRIMITIVE_CACHE_CAPACITY = 20000
tiny: .venv/.installed
	$(BIN)/python create_tiny.py output/tiny/start
	for source in procedural procedural_easy; do for split in train test; do \
		$(BIN)/python -m bench build $$source --out output/tiny/data --split $$split --num-proc 2 || exit 1; done; done
	rm -rf output/tiny/pretrain output/tiny/stage1 output/tiny/stage2 output/tiny/words
	for stage in pretrain stage1 stage2 words; do $(BIN)/torchrun --nproc-per-node 2 train_sft.py --config configs/tiny_$$stage.yaml || exit 1; done
	@echo "The checkpoint lies in output/tiny/words"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/.installed: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e . -c constraints.txt
	touch $@

.venv/.dev: .venv/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -e ".[readers,openai,app,heic,video,quantize,ray]" -r requirements-dev.txt -c constraints.txt
	touch $@

.venv/.app: .venv/.installed
	$(BIN)/python -m pip install --quiet -e ".[app,heic,video]" -c constraints.txt
	touch $@

# $(call over,FOLDER): a virtual environment that sees .venv's packages beneath its own.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
define over
	$(PYTHON) -m venv $(1)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > "$$($(1)/bin/python $(SITE))/shared.pth"
endef
# The oldest supported transformers over the rest of .venv.
$(OLDEST)/.installed: .venv/.dev
	$(call over,$(OLDEST))
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

# The one package of another contestant that PyPI gives whole without torchvision; the rest of its needs are a demo's.
$(MOGE)/.installed: .venv/.dev
	$(call over,$(MOGE))
	$(MOGE)/bin/python -m pip install --quiet --no-deps dlr-moge dlr-utils3d -c constraints.txt
	touch $@

# PyPI's torch, which its torchvision is built against, and the contestants' code over the rest of .venv. A repository
# that cannot be reached is left out, and its tests are skipped.
$(PEERS)/.installed: .venv/.dev tests/peers.txt
	rm -rf $(PEERS)
	$(call over,$(PEERS))
	$(PEERS)/bin/python -m pip install --quiet "$$(sed -n 's/^torch==/torch===/p' constraints.txt)" torchvision
	$(PEERS)/bin/python -m pip install --quiet -r tests/peers.txt -c constraints.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps depth-anything-3 dlr-utils3d
	$(PEERS)/bin/python -m pip install --quiet --no-deps --target $(PEERS)/xformers xformers==0.0.28.post3
	-git clone --quiet --depth 1 https://github.com/microsoft/MoGe $(PEERS)/src/MoGe
	-git clone --quiet --depth 1 https://github.com/lpiccinelli-eth/UniDepth $(PEERS)/src/UniDepth
	-git clone --quiet --depth 1 https://github.com/lpiccinelli-eth/UniK3D $(PEERS)/src/UniK3D
	-git clone --quiet --depth 1 https://github.com/LiheYoung/Depth-Anything $(PEERS)/src/Depth-Anything
	-git clone --quiet --depth 1 https://github.com/YvanYin/Metric3D $(PEERS)/torch/hub/yvanyin_metric3d_main
	printf '$(abspath $(PEERS))/src/%s\n' MoGe UniDepth UniK3D Depth-Anything/metric_depth > "$$($(PEERS)/bin/python $(SITE))/peers.pth"
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(NEWEST) $(DATASETS3) $(MOGE) $(PEERS) output .pytest_cache .ruff_cache
