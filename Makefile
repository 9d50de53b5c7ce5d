PYTHON ?= python3
BIN := .venv/bin

.PHONY: help install demo study study-data bench docs test test-all test-cuda lint format

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: .venv/.installed ## create .venv with the project, all its extras and the development tools

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv sync --inexact --all-extras || { \
		echo "fast-slic was not built (it needs a C++ compiler): installing all but the extra 'superpixels'"; \
		$(BIN)/uv sync --inexact --all-extras --no-extra superpixels; }
	touch $@

demo: install ## distill a teacher into a student on real digits, and print a table (2 minutes; resumes)
	$(BIN)/python experiments/digits/demo.py

study: install ## smoke test of all heads on digits over 5 seeds, two runs at a time (resumes)
	$(BIN)/python experiments/study.py digits --teacher experiments/digits/teacher.yaml --seeds 5 --picture experiments/digits/study.png

study-data: install ## data of the studies on real images: install them, or say what is missing
	$(BIN)/python experiments/study_data.py

bench: .venv-bench/.installed ## measure time and memory beside other libraries (half an hour, idle machine; BENCH="--device cuda" on a GPU)
	KINETO_LOG_LEVEL=99 .venv-bench/bin/python experiments/benchmarks $(BENCH)

.venv-bench/.installed: pyproject.toml | install
	test -x .venv-bench/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-bench
	$(BIN)/uv pip install --quiet --python .venv-bench/bin/python -e .
	for peer in scikit-image "-e .[superpixels]" torchdistill==1.1.5 nvidia-modelopt==0.47.0; do \
		$(BIN)/uv pip install --quiet --python .venv-bench/bin/python $$peer || echo "not installed: $$peer"; done
	touch $@

docs: install ## build the API reference in docs/
	$(BIN)/python .ci/docs.py

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint ## lint, and run the fast tests
	$(BIN)/python -m pytest -n 2 -m "not slow and not cuda"

test-all: lint ## lint, and run all tests but those of a GPU
	$(BIN)/python -m pytest -n 2 -m "not cuda"

test-cuda: install ## run the tests that have a meaning on a GPU, there
	$(BIN)/python -m pytest -m cuda -rs
