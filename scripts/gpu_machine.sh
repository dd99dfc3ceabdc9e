#!/usr/bin/env bash
# What a machine with a GPU and no network lacks: fetched here, installed there.
#
#   scripts/gpu_machine.sh fetch [FOLDER]                here: wheels for Python 3.12 and CUDA 13 into FOLDER (.gpu)
#   source scripts/gpu_machine.sh install [FOLDER]       there: into $SITE (/tmp/orthant-site), which PYTHONPATH names then
#
# Transformer Engine's extension for torch is compiled there, against the torch that is there, unless FOLDER holds its
# wheel; the wheel is left in $OUT, if that is set, to be carried the next time. torch itself has to be there.
# FOLDER is ignored by git: binaries are never committed.
#
# One command proves everything, on a machine where `python3` has torch 2.11 for CUDA 13:
#   source scripts/gpu_machine.sh install .gpu && make test-gpu GPU_PYTHON=python3 && python3 -m benchmarks.gpu

engine=2.11.0
architecture=90 # Hopper
packages=(megatron-core pydantic pydantic_core annotated-types typing-inspection zstandard orjson)

fetch() {
    local folder=$1 python=${PYTHON:-python3} commit
    local wheels=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp)
    local name
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        wheels+=(--platform "${name}_x86_64")
    done
    mkdir -p "$folder/whole"
    "$python" -m pip download -q "${wheels[@]}" -d "$folder" -c constraints.txt "${packages[@]}" "transformer_engine==$engine"
    "$python" -m pip download -q "${wheels[@]}" -d "$folder/whole" "transformer_engine_cu13==$engine"
    "$python" -m scripts.trim_engine "$folder"/whole/transformer_engine_cu13-*.whl "$folder" "$architecture"
    rm -r "$folder/whole"
    source_of_extension "$folder" "$python"
    commit=$(git rev-parse HEAD)
    [[ -z $(git status --porcelain --untracked-files=no) ]] || commit+=" with changes"
    printf '%s\n' "$commit" >"$folder/COMMIT" # results name what ran, and .git does not travel
    du -sh "$folder"
}

# pip runs a source's setup.py to learn its name, and this one asks torch for its CUDA: any answer will do here.
source_of_extension() {
    local folder=$1 python=$2 stub
    stub=$(mktemp -d)
    mkdir -p "$stub/torch/utils"
    printf '__version__ = "2.11.0"\nclass version:\n    cuda = "13.0"\nclass _C:\n    _GLIBCXX_USE_CXX11_ABI = True\n' \
        >"$stub/torch/__init__.py"
    : >"$stub/torch/utils/__init__.py"
    printf '%s\n' 'from setuptools.command.build_ext import build_ext as BuildExtension' \
        'from setuptools import Extension as CppExtension' >"$stub/torch/utils/cpp_extension.py"
    PYTHONPATH=$stub NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch "$python" -m pip download -q --no-deps \
        --no-build-isolation --no-binary transformer_engine_torch -d "$folder" "transformer_engine_torch==$engine"
    rm -r "$stub"
}

install() {
    local folder=$1 site=${SITE:-/tmp/orthant-site} cuda=${CUDA_HOME:-/usr/local/cuda} libraries
    local quiet=(-q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site")
    export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 NVTE_CUDA_INCLUDE_PATH=$cuda/include
    [[ ! -f $folder/COMMIT ]] || ORTHANT_COMMIT=$(<"$folder/COMMIT") && export ORTHANT_COMMIT
    if ! compgen -G "$folder/transformer_engine_torch-*.whl" >/dev/null; then
        libraries=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
        CPLUS_INCLUDE_PATH=$libraries/cu13/include:$libraries/cudnn/include:$libraries/nccl/include \
            NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch MAX_JOBS=$(nproc) CUDA_HOME=$cuda \
            python3 -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "$folder"/transformer_engine_torch-*.tar.gz ||
            return 1
        [[ -z ${OUT:-} ]] || cp "$folder"/transformer_engine_torch-*.whl "$OUT"
    fi
    python3 -m pip install "${quiet[@]}" "$folder"/*.whl || return 1
    python3 -c 'import torch, transformer_engine.pytorch; print("Transformer Engine is here")' || return 1
}

case ${1:-} in
    fetch) (set -euo pipefail && fetch "${2:-.gpu}") ;;
    install) install "${2:-.gpu}" ;;
    *)
        echo "fetch or install, then a folder" >&2
        (exit 2)
        ;;
esac
