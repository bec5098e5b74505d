#!/usr/bin/env bash
# A bare Linux machine with Python 3.11 becomes ready to train: looks at driver, cards, /dev/shm and disk, makes a virtual environment from the hash lock.
#   pod/setup.sh [--check] [folder]     --check only looks; the folder (default /workspace, else ~/astrobio) keeps venv, cache, runs, notebooks
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

check=0
if [ "${1:-}" = --check ]; then check=1; shift; fi
home="${1:-}"
if [ -z "$home" ]; then
  if [ -w /workspace ]; then home=/workspace; else home="$HOME/astrobio"; fi
fi

say() { printf '%-12s %s\n' "$1" "$2"; }

if [ "$(id -u)" -eq 0 ] && [ "$check" -eq 0 ] && [ "${ASTROBIO_ALLOW_ROOT:-0}" != 1 ]; then
  echo 'setup.sh: this is root. Make a user (useradd -m astro; su - astro), or set ASTROBIO_ALLOW_ROOT=1 on a pod that has no other' >&2
  exit 1
fi

python="$(command -v python3.11 || command -v python3)"
say python "$("$python" --version) at $python"
lock=cpu
if command -v nvidia-smi >/dev/null && cards="$(nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader 2>/dev/null)"; then
  lock=cuda
  while read -r card; do say card "$card"; done <<<"$cards"
else
  say cards 'none, or the driver does not answer: the CPU it is'
fi
shm="$(df -k --output=size /dev/shm 2>/dev/null | tail -n 1 | tr -d ' ')"
say /dev/shm "$((${shm:-0} / 1024)) MiB$( [ "${shm:-0}" -ge 1000000 ] || echo ': small for worker processes and NCCL; start the container with --shm-size=8g')"
mkdir -p "$home"
free="$(df -k --output=avail "$home" | tail -n 1 | tr -d ' ')"
say disk "$((free / 1048576)) GiB free in $home$( [ "$free" -ge 20000000 ] || echo ': checkpoints of large models need more')"
say 'open files' "$(ulimit -n)"
say lock "pod/$lock.lock"
[ "$check" -eq 0 ] || exit 0

mkdir -p "$home/cache" "$home/runs" "$home/notebooks"
[ -d "$home/venv" ] || "$python" -m venv "$home/venv"
index=()
if [ "$lock" = cpu ]; then index=(--extra-index-url https://download.pytorch.org/whl/cpu); fi
"$home/venv/bin/pip" install --require-hashes --only-binary :all: "${index[@]}" -r "$here/pod/$lock.lock"
"$home/venv/bin/pip" install --no-deps "$here"
export ASTROBIO_CACHE="$home/cache"
"$home/venv/bin/astrobio" doctor
echo "ready. JupyterLab:  PATH=$home/venv/bin:\$PATH ASTROBIO_HOME=$home $here/pod/entry.sh lab"
