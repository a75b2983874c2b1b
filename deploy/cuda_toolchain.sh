#!/usr/bin/env bash
# Installs nvcc and the CUDA headers from pinned wheels into .cuda/: no root, no GPU, nothing outside of the folder.
# An installed toolkit may be used instead: CUDA_HOME=/usr/local/cuda cargo build --features cuda
set -euo pipefail
cd "$(dirname "$0")/.."

# All five together: nvcc alone brings a newer nvvm, whose PTX its own ptxas refuses.
packages=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-crt==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85
)
stamp=.cuda/installed
wanted="${packages[*]}"
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi

rm -rf .cuda/site
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target .cuda/site "${packages[@]}"
.cuda/site/nvidia/cu13/bin/nvcc --version | tail -n 1
echo "$wanted" > "$stamp"
