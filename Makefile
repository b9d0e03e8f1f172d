# make demo   the main job on the embedded default: filter, train NCP-DPO, compare with the base model
# make test   the test suite
# make lint   ruff (lint and format) and mypy
# Each sets up what it needs: a virtual environment in .venv with the pinned requirements.
# An interrupted call is continued by the same call. Another Python or place: make PYTHON=python3.13 VENV=.venv313 test

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := output/demo
CARD := $(DEMO)/lora/README.md

# What the caller's shell has set for other environments, and its locale, do not reach this one.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONSAFEPATH PIP_TARGET PIP_PREFIX
export PYTHONUTF8 := 1
export PIP_USER := 0
# Threads that wait for one another sleep: beside other work, spinning ones cost several times the whole.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clean-demo
.DELETE_ON_ERROR:

demo: $(DEMO)/summary.txt
	@cat $(DEMO)/summary.txt

# A step's name and expected time before it, and its own time after it. The commands themselves stay plain, so that make
# starts them without a shell in between, and passes signals on to them.
begin = @printf '\nstep %s of 4: %s, about %s\n' $(1) "$(2)" "$$(sed -n $(1)p $(DEMO)/forecast.txt)"; \
	date +%s > $(DEMO)/began
end = @printf 'step %s of 4 took %s s\n' $(1) $$(($$(date +%s) - $$(cat $(DEMO)/began))); rm $(DEMO)/began

$(DEMO)/forecast.txt: | $(VENV)/ready
	@echo "The demo, in four steps: filter preferences, train NCP-DPO, draw with both models, compare."
	@echo "Interrupted, it goes on where it was: make demo. First, how fast is this machine?"
	@$(RUN) -m tiny.forecast $@

$(DEMO)/filtered/manifest.json: | $(DEMO)/forecast.txt
	$(call begin,1,filter the preferences)
	$(RUN) filter_pickapic.py --config configs/tiny_filter.yaml --output_dir $(DEMO)/filtered
	$(call end,1)

# The card is the last file that a run writes. A run that was interrupted goes on from its newest checkpoint.
$(CARD): $(DEMO)/filtered/manifest.json | $(DEMO)/forecast.txt
	$(call begin,2,train NCP-DPO)
	@rm -rf $(DEMO)/images/tuned
	$(RUN) train_ncp_dpo.py --config configs/tiny_ncp_dpo.yaml --dataset_name $(DEMO)/filtered \
		--output_dir $(DEMO)/lora --resume_from_checkpoint auto
	$(call end,2)

# Pictures and scores that are there already stay.
EVALUATE := --config configs/eval_tiny.yaml

$(DEMO)/index.parquet: $(CARD) | $(DEMO)/forecast.txt
	$(call begin,3,draw the held-out prompts with both models)
	$(RUN) evaluate.py generate $(EVALUATE)
	$(call end,3)

$(DEMO)/summary.txt: $(DEMO)/index.parquet | $(DEMO)/forecast.txt
	$(call begin,4,judge and compare)
	$(RUN) evaluate.py score $(EVALUATE)
	@exec $(RUN) evaluate.py compare $(EVALUATE) > $(DEMO)/compare.log
	$(call end,4)

test: $(VENV)/ready
	@echo "The tests, one process for each of up to four cores. The slowest and a closing line come at the end."
	$(RUN) -m pytest -n auto --dist worksteal

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean-demo:
	rm -rf $(DEMO)

# A first set-up that did not end leaves `unfinished`, and is made anew; an environment that was there is completed.
$(VENV)/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "Python 3.10 to 3.13 is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11")'
	@echo "Setting up $(VENV), once: PyTorch and the other requirements, pinned."
	@echo "On Linux pip takes PyTorch with CUDA: 3.0 GB to download, 5.7 GB on the disk, about 7 minutes at 10 MB/s."
	@echo "Without CUDA (macOS; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu): 0.5 GB, 2.0 GB, 2 minutes."
	@echo "Interrupted, it is begun anew by the same call. What takes long:"
	@if [ ! -e $(VENV) ]; then mkdir -p $(VENV) && touch $(VENV)/unfinished; fi
	@if [ -e $(VENV)/unfinished ]; then find $(VENV) -mindepth 1 -maxdepth 1 ! -name unfinished -exec rm -rf {} +; fi
	@date +%s > $(VENV)/began
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) tiny/install.py -r requirements-dev.txt
	@printf 'set up in %s s\n\n' $$(($$(date +%s) - $$(cat $(VENV)/began)))
	@rm -f $(VENV)/unfinished $(VENV)/began
	@touch $@
