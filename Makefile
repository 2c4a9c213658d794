# Two commands do all the set-up: `make demo` and `make test`. Both work in .venv, which they make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean
.SILENT:

demo: $(VENV)/demo.done
	$(RUN) -m sparsec.models.demo

test: $(VENV)/test.done
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/dev.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PYTHONPATH=.typing $(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info

# What must be there before anything is installed, each missing thing in one sentence.
$(VENV)/ready:
	command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) was found: install Python 3.10 or newer (apt install python3 python3-venv, dnf install python3), or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), and sparsec needs Python 3.10 or newer: install one and say make PYTHON=/path/to/python3.10" >&2; exit 1; }
	sh -c 'set -- $${CC:-cc}; command -v "$$1"' >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { echo "error: no C compiler was found: install one (apt install gcc libc6-dev on Debian or Ubuntu, dnf install gcc on Fedora, xcode-select --install on macOS)" >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments: install its venv module (apt install python3-venv on Debian or Ubuntu)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -qq --disable-pip-version-check --upgrade pip
	touch $@

$(VENV)/%.done: pyproject.toml $(VENV)/ready
	echo "installing sparsec[$*] into $(VENV), about 800 MB" >&2
	$(RUN) -m pip install -qq --disable-pip-version-check -e '.[$*]'
	touch $@
