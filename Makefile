# `make demo` and `make test` do all their own set-up, in a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed

.PHONY: demo test clean
demo: $(STAMP)
	$(VENV)/bin/mlic demo -o demo.png

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

# torch first and alone, so that its CPU build comes from its own index and everything else from PyPI.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) torch -c constraints.txt
	$(VENV)/bin/pip install --quiet -e '.[test]' -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo.png
