#!/usr/bin/env bash
# What has to be seen on a GPU, in 8 minutes on one, without network and without checkpoints:
#   bash tests/bench/gpu.sh [--only N] [--out FOLDER]
# Parts, see bench_gpu.py: 1 the stand-in, 2 the real Wan code with tiny models, 3 t2v-1.3B of full
# size, 4 attention, 5 t2v-14B of full size. Their rows are in FOLDER/gpu.txt as they come, what else
# they print in gpu.log.
# Without a GPU all sizes are small: that tries this command and measures nothing.
#
# Needs, beside the repository without its .git (15 MiB):
#   $WAN_REPO, $WAN22_REPO   checkouts of Wan2.1 and Wan2.2: *.py and examples/ (6 MiB)
#   $WHEELS                  a folder for PYTHONPATH with those of these that the machine lacks:
#                            diffusers, easydict, einops, imageio, imageio-ffmpeg, safetensors,
#                            scikit-image, tqdm, transformers, opencv-python-headless, torchvision;
#                            as wheels the first two and imageio-ffmpeg==0.6.0 are about 36 MiB
# flash-attn is used where it is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="${WHEELS:-}:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" tests/bench/bench_gpu.py "$@"
