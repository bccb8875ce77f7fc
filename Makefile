# Everything runs in .venv, which is made on first use: nothing has to be activated.
PYTHON = python3
PIP = .venv/bin/python -m pip --disable-pip-version-check

.PHONY: help .venv test demo sft vlm

help:
	@echo "make demo    Flow-SDE PPO from the shipped SFT policy, then both policies evaluated: table, curve, GIF"
	@echo "make test    all tests"
	@echo "make sft     makes checkpoints/tabletop-sft again: SFT on 5 demonstrations per task"
	@echo "make vlm     makes checkpoints/tiny again: pre-training of the tiny pi0, 25 minutes"
	@echo "make .venv   only installs requirements.txt into .venv"
	@echo "PYTHON=...   the interpreter that .venv is made with, 3.11 or newer (now: $(PYTHON))"

.venv: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "error: $(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 2; }
	@echo "installing requirements.txt into .venv, once"
	@$(PYTHON) -m venv .venv
	@$(PIP) install --quiet -r requirements.txt
	@touch $@

test: .venv
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --durations 10 tests

demo: .venv
	@set -e; folder=runs/demo-$$(date +%Y%m%d-%H%M%S); \
	.venv/bin/python flow_sde_ppo.py --seed 1 --run-dir $$folder; \
	run=$$(dirname $$folder/*/checkpoint); \
	.venv/bin/python evaluate.py --checkpoints checkpoints/tabletop-sft $$run/checkpoint --labels SFT RL \
		--stochastic --json $$run/evaluation.json --capture-video $$run/sft_rl.gif; \
	echo "learning curve: $$run/learning_curve.png"

sft: .venv
	@.venv/bin/python flow_sft.py

vlm: .venv
	@.venv/bin/python flow_sft.py --pretrain
