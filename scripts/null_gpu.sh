#!/usr/bin/env bash
# The GPU path on a machine without a GPU: the real torch for CUDA, Transformer Engine and Triton over libraries of
# NVIDIA's that do nothing (scripts/null_gpu, docs/gpu.md). Kernels compute nothing: it proves the host's side alone.
#
#   scripts/null_gpu.sh install FOLDER       an environment in FOLDER, which must not be there yet: 3 GB are fetched,
#                                            6 GB kept, and Transformer Engine's extension compiled (12 minutes of CPU)
#   scripts/null_gpu.sh build FOLDER         its null libraries once more, after a change in scripts/null_gpu
#   scripts/null_gpu.sh run FOLDER CMD...    CMD in that environment, with this checkout's packages
#
# Needs a Python that is named by PYTHON (python3; 3.11 or 3.12), its headers, g++ and nm. No root, and nothing outside
# FOLDER changes. WHEELS names a folder where Transformer Engine's wheel is looked for, and left when it is made
# (FOLDER/wheels).
#
#   ORTHANT_NULL_GPU_DEVICES   cards (1); CUDA_VISIBLE_DEVICES is honoured
#   ORTHANT_NULL_GPU_GIB       memory of a card (139.8, as torch shows an H200's)
#   ORTHANT_NULL_GPU_LOG       a line for every launch, product, copy and collective into this path.PID
#   ORTHANT_NULL_GPU_CACHE     torch's allocator keeps memory, as on a card, and counts its peak; what kernels should have
#                              written is then what lay there before. Without it every tensor begins as zeros, and graphs
#                              that are replayed write where nothing is any more
#   ORTHANT_NULL_GPU_COMPUTE   what kernels should compute is computed on the CPU, from reference formulas: small shapes;
#                              a kernel that nothing stands for fails by its name, and torch.compile is off
#   ORTHANT_NULL_GPU_TRACE     names on stderr the functions that are empty here and were called

set -euo pipefail

torch=2.11.0
engine=2.11.0
headers='==13.0.*' # of the CUDA that this torch was built with
exchange=
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

refuse() {
    printf '%s\n' "$1" >&2
    exit 2
}

install() {
    local folder=$1 pip
    if [[ -e $folder && ! -f $folder/null_gpu.txt ]]; then
        refuse "$folder is there and no environment of this script: name a folder that is not there"
    fi
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    printf 'made by scripts/null_gpu.sh install: NVIDIA libraries in here do nothing\n' >"$folder/null_gpu.txt"
    [[ -x $folder/bin/python ]] || "${PYTHON:-python3}" -m venv "$folder"
    pip=("$folder/bin/python" -m pip --disable-pip-version-check)
    # The versions that the tests ran with, but for this older torch and the setuptools that it takes.
    sed "s/^torch==.*/torch==$torch/; /^setuptools==/d" "$root/constraints.txt" >"$folder/constraints.txt"
    echo "1 of 3: torch $torch for CUDA and what Orthant needs"
    "${pip[@]}" install -q -c "$folder/constraints.txt" "torch==$torch"
    "${pip[@]}" install -q -c "$folder/constraints.txt" -e "$root" transformers pytest pytest-timeout hypothesis
    echo "2 of 3: Transformer Engine $engine"
    transformer_engine "$folder" "${pip[@]}"
    echo "3 of 3: null libraries"
    build "$folder"
    run "$folder" python -c 'import torch, transformer_engine.pytorch
print(torch.cuda.get_device_name(), torch.__version__, "Transformer Engine", transformer_engine.__version__)'
}

transformer_engine() {
    local folder=$1 pip=("${@:2}") wheels=${WHEELS:-$1/wheels} cuda
    cuda=$(libraries "$folder")/cu13
    mkdir -p "$wheels"
    "${pip[@]}" install -q "nvidia-cuda-nvcc$headers" "nvidia-cuda-crt$headers" "nvidia-cuda-cccl$headers" \
        "nvidia-cuda-profiler-api$headers" einops onnx onnxscript importlib_metadata ninja pybind11 'setuptools<82' wheel
    "${pip[@]}" install -q --no-deps "transformer_engine==$engine" "transformer_engine_cu13==$engine"
    if ! compgen -G "$wheels/transformer_engine_torch-$engine-*.whl" >/dev/null; then
        PATH=$folder/bin:$PATH CUDA_HOME=$cuda NVTE_CUDA_INCLUDE_PATH=$cuda/include MAX_JOBS=${MAX_JOBS:-$(nproc)} \
            NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch CXXFLAGS=-O0 \
            CPLUS_INCLUDE_PATH=$cuda/include:$cuda/../cudnn/include:$cuda/../nccl/include \
            "${pip[@]}" wheel -q --no-deps --no-build-isolation -w "$wheels" "transformer_engine_torch==$engine"
    fi
    "${pip[@]}" install -q --no-deps "$wheels"/transformer_engine_torch-"$engine"-*.whl
}

libraries() {
    printf '%s/nvidia' "$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
}

build() {
    ours "$1"
    PYTHONPATH=$root "$1/bin/python" -m scripts.null_gpu.build "$1"
}

ours() {
    [[ -f $1/null_gpu.txt ]] || refuse "$1 is no environment of this script: scripts/null_gpu.sh install $1 makes one"
}

run() {
    local folder code=0
    ours "$1"
    folder=$(cd "$1" && pwd)
    export PATH=$folder/bin:$PATH PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    export LD_LIBRARY_PATH=$folder/null${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} TRITON_LIBCUDA_PATH=$folder/null
    export CUDA_HOME NVTE_DISABLE_NVRTC=1 # what NVRTC compiles would have to be loaded
    CUDA_HOME=$(libraries "$folder")/cu13
    [[ -z ${ORTHANT_NULL_GPU_COMPUTE:-} ]] || export TORCHDYNAMO_DISABLE=1 # its kernels would not be computed
    [[ -n ${ORTHANT_NULL_GPU_CACHE:-} ]] || export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    if [[ -z ${ORTHANT_NULL_GPU_EXCHANGE:-} ]]; then # where ranks meet; memory, and empty when the command is over
        exchange=$(mktemp -d /dev/shm/orthant-null-gpu.XXXXXX)
        export ORTHANT_NULL_GPU_EXCHANGE=$exchange
        trap 'rm -rf "$exchange"' EXIT
    fi
    "${@:2}" || code=$?
    return "$code"
}

usage="install FOLDER, build FOLDER, or run FOLDER CMD...: the head of ${BASH_SOURCE[0]} says more"
case ${1:-} in
    install | build) (($# == 2)) || refuse "$usage" ;;
    run) (($# >= 3)) || refuse "$usage" ;;
    *) refuse "$usage" ;;
esac
"$@"
