# Makes `nvcc` available to compile kernels, without root, a GPU or a driver. To be sourced; sets
# CUDA_HOME. A toolkit that is there already (CUDA_HOME, or nvcc on PATH) is used; otherwise CUDA
# 13.0's compiler is installed with pip, once, into a cache directory (300 MB).

if [ -x "${CUDA_HOME:-}/bin/nvcc" ]; then
  :
elif command -v nvcc >/dev/null; then
  CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
else
  cuda_venv=${XDG_CACHE_HOME:-$HOME/.cache}/titanbit-ci/cuda-13.0
  # The marker is the last thing written: an install that was cut short is made anew.
  if [ ! -e "$cuda_venv/complete" ]; then
    echo "installing nvcc into $cuda_venv"
    rm -rf "$cuda_venv"
    python3 -m venv "$cuda_venv"
    "$cuda_venv/bin/pip" install --quiet --no-deps \
      'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
      'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'
    touch "$cuda_venv/complete"
  fi
  CUDA_HOME=$("$cuda_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
fi
export CUDA_HOME
