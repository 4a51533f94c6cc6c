# Everything runs in .venv; each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GOLDEN ?= tests/golden
# The oldest Triton that setup.py admits. The kernels are compiled with it as well; it has its own folder beside .venv.
OLDEST_TRITON := 3.6.0
REHEARSAL := .rehearsal/venv

.PHONY: help setup demo test test-fast stress chaos test-golden test-gpu lint bench bench-sampling gpu-proof rehearse bench-kernels aot compare-inductor
.DEFAULT_GOAL := help

help:  ## print these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

setup: $(READY) .triton-$(OLDEST_TRITON)/.ready  ## make .venv with fastdiff and all it needs (Python 3.10 to 3.13)

$(READY): setup.py constraints.txt
	$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else "fastdiff needs Python 3.10 to 3.13, this is " + sys.version.split()[0] + "; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -e '.[demo,test,datasets,benchmark,evaluation,lint]' -c constraints.txt
	touch $(READY)

.triton-%/.ready: | $(READY)
ifeq ($(shell uname),Linux)
	rm -rf .triton-$*
	$(BIN)/python -m pip install --quiet --no-deps --target .triton-$* triton==$*
endif
	mkdir -p .triton-$*
	touch $@

demo: $(READY)  ## train on handwritten digits, draw some, score others: a few minutes on two CPU cores
	$(BIN)/python datasets/digits.py --out .demo/digits
	$(BIN)/deepspeed --log_level error fastdiff/train.py --config configs/demo.json
	$(BIN)/python fastdiff/sample.py --model_path .demo/run --num_samples 100 --batch_size 50 \
	    --classes 0,1,2,3,4,5,6,7,8,9 --solver dpmpp_2m_sde --steps 25 --guidance 2 --precision bf16 \
	    --trajectory 10 --overwrite True --out_dir .demo/samples
	$(BIN)/python fastdiff/nll.py --model_path .demo/run --data_dir .demo/digits/test --num_samples 20 \
	    --batch_size 20 --timestep_respacing 100 --out_dir .demo/nll
	@echo 'Look at .demo/samples/samples_100x16x16x1.png: each row is a class, 0 to 9. The steps of ten of them: samples_100x16x16x1_steps.gif'

test: $(READY) .triton-$(OLDEST_TRITON)/.ready  ## run all tests on the CPU: about 30 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests

test-fast: $(READY) .triton-$(OLDEST_TRITON)/.ready  ## run the tests that are not marked slow: about 8 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' tests

stress: $(READY)  ## run kills, hostile input, dying ranks and two nodes for an hour; `make test` has a short version of each
	$(BIN)/python tests/stress/chaos.py --kills $(or $(KILLS),100)
	$(BIN)/python tests/stress/fuzz/run.py --seconds $(or $(SECONDS),900)
	$(BIN)/python tests/stress/deaths.py
	$(BIN)/python tests/stress/two_nodes/two_nodes.py --all

chaos: $(READY)  ## kill a small training run a hundred times at random instants; nothing may be lost (KILLS=100)
	$(BIN)/python tests/stress/chaos.py --kills $(or $(KILLS),100)

test-golden: $(READY)  ## compare with the recorded numbers only; FASTDIFF_GOLDEN=FOLDER for others of the same kinds
	OMP_NUM_THREADS=1 FASTDIFF_GOLDEN=$(abspath $(or $(FASTDIFF_GOLDEN),$(GOLDEN))) $(BIN)/python -m pytest tests/golden

test-gpu: $(READY)  ## run the tests that need a GPU, those of the kernels on it, and those of recorded numbers
	$(BIN)/python benchmarks/gpu_proof.py --again --only kernels golden 'gpu tests'

lint: $(READY)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastdiff kernels

bench: $(READY)  ## time training steps against improved-diffusion's and others', for a small network on a CPU: minutes
	$(BIN)/python -m pip install --quiet -e '.[peers]' -c constraints.txt
	$(BIN)/python benchmarks/bench_train.py --quick --json benchmarks/results/train_quick_cpu.json
	$(BIN)/python benchmarks/report.py benchmarks/results/train_quick_cpu.json \
	    --markdown benchmarks/results/train_quick_cpu.md --chart benchmarks/results/train_quick_cpu.svg

bench-sampling: $(READY)  ## time drawing against improved-diffusion's and others', for a small network on a CPU: minutes
	$(BIN)/python -m pip install --quiet -e '.[peers]' -c constraints.txt
	$(BIN)/python benchmarks/bench_sampling.py --quick --json benchmarks/results/sampling_quick_cpu.json
	$(BIN)/python benchmarks/report.py benchmarks/results/sampling_quick_cpu.json \
	    --markdown benchmarks/results/sampling_quick_cpu.md --chart benchmarks/results/sampling_quick_cpu.svg

gpu-proof: $(READY)  ## check and measure everything on a GPU: 90 minutes or more, the most valuable first; SECONDS=560, ARGS='--only ...'
	$(BIN)/python -m pip install --quiet -e '.[peers]' -c constraints.txt
	$(BIN)/python benchmarks/gpu_proof.py --keep benchmarks/results $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS) || [ $$? -eq 3 ]

$(REHEARSAL)/.ready: constraints.txt
	$(PYTHON) -m venv $(REHEARSAL)
	grep -Ev '^(torch|triton|numpy|setuptools|nvidia)' constraints.txt > $(REHEARSAL)/constraints.txt
	DS_BUILD_OPS=0 $(REHEARSAL)/bin/python -m pip install --quiet torch==2.11.0 triton==3.6.0 numpy \
	    'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' deepspeed diffusers pillow psutil pydantic safetensors \
	    tensorboard tqdm hypothesis lmdb matplotlib pytest pytest-benchmark pytest-timeout pytest-xdist scikit-learn \
	    -c $(REHEARSAL)/constraints.txt
	touch $(REHEARSAL)/.ready

rehearse: $(REHEARSAL)/.ready  ## run gpu-proof on a simulated H100, which computes nothing: x86-64 Linux, g++, 6 GB of disk, 90 minutes; ARGS='--only machine'
	$(REHEARSAL)/bin/python -m pytest tests/benchmarks/test_rehearsal.py
	$(REHEARSAL)/bin/python benchmarks/rehearsal/run.py $(REHEARSAL)/bin/python benchmarks/gpu_proof.py \
	    --out .rehearsal/proof --work .rehearsal/work --stretch 30 --rehearsal $(ARGS)

bench-kernels: $(READY)  ## time every kernel against PyTorch, torch.compile and peers, figures in benchmarks/results
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest -W ignore -o python_files='bench_*.py' -o python_functions='bench_*' -o timeout=3600 \
	    $(wildcard benchmarks/bench_*.py) -k '$(or $(K),bench)' --benchmark-json benchmarks/results/kernels.json

aot: $(READY) $(if $(TRITON),.triton-$(TRITON)/.ready)  ## compile all kernels for sm_80, sm_90, sm_100, and read the machine code (TRITON=3.6.0, ARCHS=90)
	mkdir -p benchmarks/results build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/kernels tests/golden/test_golden_kernels.py \
	    --ignore=tests/kernels/test_aot.py --launches build/launches.jsonl
	$(if $(TRITON),PYTHONPATH=.triton-$(TRITON)) $(BIN)/python benchmarks/aot.py --launches build/launches.jsonl \
	    $(if $(ARCHS),--archs $(ARCHS)) --json benchmarks/results/aot$(if $(TRITON),-$(TRITON)).json

compare-inductor: $(REHEARSAL)/.ready  ## predict the time of our kernels and of torch.compile's for the same ops, for an H100: half an hour; ARGS='--ops output_layer'
	OMP_NUM_THREADS=1 $(REHEARSAL)/bin/python benchmarks/rehearsal/run.py $(REHEARSAL)/bin/python benchmarks/compare_inductor.py \
	    $(or $(ARGS),--json benchmarks/results/inductor_cost_sm90.json)
