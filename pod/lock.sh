#!/usr/bin/env bash
# Write pod/cuda.lock and pod/cpu.lock: exact versions and hashes of everything in the images. Needs uv. What is compiled on the machine
# (flash-attn, deepspeed) is not in them. For the CPU, torch's own index must be reachable, or FIND_LINKS name a folder with its wheel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
grep -hvE '^(#|$|deepspeed)' requirements/base.txt requirements/pod.txt > "$work/cuda.in"
sed -E 's/^torch[>=].*/torch==2.13.0+cpu/' "$work/cuda.in" | grep -v nvidia-ml-py > "$work/cpu.in"
options=(-q --generate-hashes --no-header --no-annotate --no-emit-find-links --no-emit-index-url --only-binary :all: --python-version 3.11 --python-platform x86_64-manylinux_2_28)
uv pip compile "${options[@]}" "$work/cuda.in" -o pod/cuda.lock > /dev/null
torch=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
[ -z "${FIND_LINKS:-}" ] || torch=(--find-links "$FIND_LINKS")
uv pip compile "${options[@]}" "${torch[@]}" "$work/cpu.in" -o pod/cpu.lock > /dev/null
wc -l pod/*.lock
