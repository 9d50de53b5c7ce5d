PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo study bench test test-all lint format

help: ## show what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: .venv/.installed ## make .venv with the project and all its extras

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv sync --inexact --all-extras || { \
		echo "fast-slic was not built (it needs a C++ compiler): installing all but the extra 'superpixels'"; \
		$(BIN)/uv sync --inexact --all-extras --no-extra superpixels; }
	touch $@

demo: install ## distill a teacher into a student on real digits (about 2 minutes; resumes)
	$(BIN)/python experiments/digits/demo.py

study: install ## smoke test of all heads on digits over 5 seeds, two runs at a time (resumes)
	$(BIN)/python experiments/study.py digits --teacher experiments/digits/teacher.yaml --seeds 5 --picture experiments/digits/study.png

bench: .venv-bench/.installed ## time it beside its peers on an idle machine (about 10 minutes; BENCH="--device cuda" on a GPU)
	KINETO_LOG_LEVEL=99 .venv-bench/bin/python experiments/benchmarks $(BENCH)

.venv-bench/.installed: pyproject.toml | install
	test -x .venv-bench/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-bench
	$(BIN)/uv pip install --quiet --python .venv-bench/bin/python -e .
	for peer in scikit-image "-e .[superpixels]" torchdistill==1.1.5 nvidia-modelopt==0.47.0; do \
		$(BIN)/uv pip install --quiet --python .venv-bench/bin/python $$peer || echo "not installed: $$peer"; done
	touch $@

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## put the code into its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## lint, and all tests that are fast
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint ## lint, and all tests
	$(BIN)/python -m pytest -n 2
