# Set-up, the main job and the tests, each from a fresh clone.
#   make quickstart   environment, sample corpus, training, probes, export
#   make test         environment, the default test suite
#   make test-slow    the tests marked slow (minutes)
#   make lint         ruff
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := PATH="$(abspath $(BIN)):$$PATH"
OUT ?= outputs/quickstart
# One process a core, four at most: files of several ranks have more processes than that of their own.
# By file, so that a run which a file's tests share is made once.
PYTEST := python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1

.PHONY: env quickstart test test-slow test-gpu lint clean

env: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@echo "== environment in $(VENV) (downloads the pinned packages once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

quickstart: env
	@echo "== kernels"
	@$(RUN) python -m trelm_ds.ops.build
	@echo "== sample corpus"
	@test -f outputs/sample_data/manifest.json || \
		$(RUN) python launch/prepare.py sample --output outputs/sample_data
	@echo "== training, with probes before and after"
	@$(RUN) deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json \
		--data_dir outputs/sample_data --output_dir $(OUT) --resume_from_checkpoint latest
	@echo "== next"
	@echo "  probe the export   $(BIN)/python launch/evaluate.py lama --model $(OUT)/hf --data outputs/sample_data --json $(OUT)/lama.json"
	@echo "  the baseline       $(BIN)/deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json --method dkplm"
	@echo "  your own text      $(BIN)/python launch/prepare.py jsonl --input text.jsonl --graph GRAPH_DIR --output DIR, then --data_dir DIR"

test: env
	$(RUN) $(PYTEST)

test-slow: env
	$(RUN) python -m pytest -q -m slow --timeout 3600

test-gpu: env
	$(RUN) python -m pytest -q -m gpu

lint: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
