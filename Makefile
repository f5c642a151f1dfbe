# Everything runs in .venv. The first target that needs it creates it.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# The number of subjects for `make quality`; 10 gives the full table.
K ?= 3
ALL_METHODS := untuned ti lora lora_class full full_class lora_pivotal full_pivotal

.PHONY: env studio demo test test-gpu check check-real format quality serve serve-train serve-preprocess clean
.DEFAULT_GOAL := env

env: .venv/.complete

.venv/.complete: requirements-dev.txt deploy/requirements.txt
	@echo "Creating the environment in .venv: about 2 GB, a few minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
	@echo "The environment is ready. Next: make demo, make test, or make check."

# Gradio's own wish for an older Pillow is passed over: see requirements-studio.txt.
.venv/.studio-complete: .venv/.complete requirements-studio.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-studio.txt
	@touch $@

# Options go into ARGS, such as ARGS="--port 8000".
studio: .venv/.studio-complete
	$(BIN)/python studio.py $(ARGS)

demo: env
	$(BIN)/python demo.py -o demo_out

test: .venv/.studio-complete
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test-gpu: env
	$(BIN)/python -m pytest -m gpu

check: .venv/.studio-complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m tools.cog_schema
	$(BIN)/python -m tools.cog_schema --config cog.preprocess.yaml --folder runs/preprocessor

# For people with a GPU and the hub. Options go into ARGS, such as ARGS="--only latents --steps 500".
check-real: env
	$(BIN)/python -m benchmarks.check_real $(ARGS)

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: env
	$(BIN)/python -m benchmarks.quality --subjects $(K) $(if $(filter 10,$(K)),--base-prompts 500 --methods $(ALL_METHODS),--base-prompts 50 --output runs/quality-of-$(K))

# Without a schema Cog's server checks no input. `cog build` overwrites it, so each start makes it anew.
serve: env
	$(BIN)/python -m tools.cog_schema
	PORT=5000 COG_PREDICT_TYPE_STUB=predict.py:Predictor exec python -m cog.server.http --host 127.0.0.1

serve-train: env
	$(BIN)/python -m tools.cog_schema
	PORT=5001 COG_TRAIN_TYPE_STUB=train.py:train exec python -m cog.server.http --host 127.0.0.1 --x-mode train

# Cog's server reads the schema from the folder that it starts in, so each model needs its own folder.
serve-preprocess: env
	$(BIN)/python -m tools.cog_schema --config cog.preprocess.yaml --folder runs/preprocessor
	cd runs/preprocessor && PORT=5002 PYTHONPATH=$(CURDIR) COG_PREDICT_TYPE_STUB=$(CURDIR)/preprocess.py:Preprocessor exec python -m cog.server.http --host 127.0.0.1

clean:
	rm -rf .venv demo_out .pytest_cache .ruff_cache
