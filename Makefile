PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test sm86 sanitize kills lint bench clean

install: $(VENV)/.installed

# torch first, so that nothing else pulls another build of it.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt "setuptools>=80" "pybind11>=2.13"
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: install
	$(BIN)/slmfast run

# Two processes of one thread each: most tests keep one core busy, and torch's threads would wait for one another.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Every Triton kernel compiled for the RTX 3090 and read back from its machine code; needs no GPU. make test runs it too.
sm86: install
	$(BIN)/python bench/sm86.py

# The native module under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: its tests on every
# instruction set, and FUZZ inputs of every bad kind. About half an hour; make sanitize FUZZ=100000 is shorter.
FUZZ ?= 1000000
sanitize: install
	$(BIN)/python tests/sanitize/run.py --inputs $(FUZZ)

# A small miniature killed at KILLS random instants and started again each time, against an unbroken run, byte by byte.
KILLS ?= 50
kills: install
	$(BIN)/python tests/kills/run.py --kills $(KILLS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/slmfast bench dedup

clean:
	rm -rf build dist *.egg-info slmfast/_native*.so
