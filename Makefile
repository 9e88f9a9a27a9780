# Two commands set everything up on a machine with Python 3.11 or later and make:
#   make demo   runs the quickstart and says where its page is
#   make test   checks the code and runs the tests
# A third one measures speed; make bench ARGS=--quick takes a minute instead of six:
#   make bench

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-lowest lint format bench clean

demo: $(VENV)/demo-ready
	$(BIN)/helios simulate scenarios/quickstart.toml --out runs/quickstart
	@echo "Open $(CURDIR)/runs/quickstart/report.html in a browser."

# A file stays with one worker, so that what its tests share is made once.
test: lint
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/test-ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/test-ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Old packages warn of what has changed since; only here that is no failure.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c tests/lowest.txt -e '.[cluster]' pytest pytest-xdist hypothesis
	$(VENV)-lowest/bin/pytest -n auto --maxprocesses 4 --dist loadfile -W default --ignore tests/calibration --ignore tests/reports

bench: $(VENV)/demo-ready
	$(BIN)/python -m benchmarks $(ARGS)

# Runs stay: trained models and readings among them take longer to make than anything here.
clean:
	rm -rf $(VENV) $(VENV)-lowest build *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-ready: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# The tests' environment names torch's release first: another package would ask for the newest.
$(VENV)/test-ready: $(BIN)/python pyproject.toml tests/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c tests/constraints.txt -e '.[dev,calibration]'
	touch $@ $(VENV)/demo-ready
