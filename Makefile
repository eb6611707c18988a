# make run   - make the environment, then the whole demonstration; Ctrl-C ends it
# make test  - the same environment, then every test: first, on two workers, those without
#              a cluster; then those with one, each of which has both cores to itself
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON ?= python3
CLUSTER := tests/ray tests/demonstration

.PHONY: run test check fmt proto bench clean

run: $(STAMP)
	$(PY) -m examples.demonstration $(if $(ONCE),--once)

test: $(STAMP)
	$(PY) -m pytest -q -n 2 --dist loadfile $(CLUSTER:%=--ignore %)
	$(PY) -m pytest -q $(CLUSTER)

check: $(STAMP)
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/ruff format -q --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m pytest -q -n 2 -m "not slow" --ignore tests/ray

fmt: $(STAMP)
	$(VENV)/bin/ruff check -q --fix .
	$(VENV)/bin/ruff format -q .

# Generated code is committed; this makes it anew and fails if it differs.
proto: $(STAMP)
	$(PY) -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. \
		proto/ztserve/*/v1/*.proto
	git diff --exit-code -- ztserve/transport/v1 ztserve/identity/v1 \
		ztserve/doors/v1

bench: $(STAMP)
	$(PY) -m bench.request
	$(PY) -m bench.stages

$(STAMP): pyproject.toml constraints.txt
	@echo "installing about 165 packages into $(VENV): minutes, without a word"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt -e ".[serve,text,examples,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV)
