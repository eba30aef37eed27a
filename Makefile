# Every target creates .venv and installs what is needed first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# As the console command: threads that wait in a loop keep cores from other programs, and then from each other.
export OMP_WAIT_POLICY ?= PASSIVE
VIDEO ?=
FRAMES ?=
OUTPUT ?= outputs/demo
# What users name reaches the tools through the environment, so that neither make nor a shell reads anything into it.
unexport VIDEO FRAMES OUTPUT
export GIVEN_VIDEO := $(value VIDEO)
export GIVEN_FRAMES := $(value FRAMES)
export GIVEN_OUTPUT := $(value OUTPUT)

.DEFAULT_GOAL := help
.PHONY: help install demo serve test lint format docs sweep data train clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

install: $(VENV)/installed  ## create .venv and install the package with its development tools

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: install  ## detect in a video: make demo [VIDEO=my.mp4] [FRAMES=100] [OUTPUT=outputs/demo]
	$(RUN) tools/demo.py $${GIVEN_VIDEO:+source="$$GIVEN_VIDEO"} $${GIVEN_FRAMES:+max_frames="$$GIVEN_FRAMES"} \
		output="$$GIVEN_OUTPUT"

serve: install  ## watch in a browser, with a slider for the budget: make serve [VIDEO=my.mp4]
	$(RUN) tools/serve.py source="$${GIVEN_VIDEO:-synthetic:1}"

test: install  ## run all tests
	$(RUN) -m pytest

lint: install  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy eventful_det tools datasets

format: install  ## rewrite the code in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: install  ## build the documentation as a site: outputs/site/index.html
	$(RUN) -m pip install --quiet --editable '.[docs]'
	$(RUN) docs/build_site.py

.data/synthetic_vid/annotations/imagenet_vid_val.json: | install
	$(RUN) datasets/make_synthetic_vid.py --output .data/synthetic_vid
	$(RUN) datasets/prepare_imagenet_vid.py .data/synthetic_vid

data: install .data/synthetic_vid/annotations/imagenet_vid_val.json  ## make and prepare the synthetic data set

train: data  ## train vitdet_tiny on the synthetic data set (about an hour on 2 cores)
	$(RUN) tools/train_net.py

sweep: data  ## accuracy against cost: all budgets and baselines on the synthetic validation split
	$(RUN) tools/eval_net.py eval=sweep output=outputs/sweep

clean:  ## remove what the tools wrote, but not .venv and .data
	rm -rf outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
