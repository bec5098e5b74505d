#!/usr/bin/env bash
# What the container does: `lab` starts JupyterLab, `keep RUN` goes on with a training in the foreground, anything else is a command of astrobio.
set -euo pipefail

home="${ASTROBIO_HOME:-/workspace}"
ip="${ASTROBIO_LAB_IP:-127.0.0.1}"
port="${ASTROBIO_LAB_PORT:-8888}"

die() { echo "astrobio-pod: $*" >&2; exit 1; }

[ "$(id -u)" -ne 0 ] || die "this is root; run the container as its user (drop --user 0), or another one with --user UID"
mkdir -p "$home/cache" "$home/runs" "$home/notebooks" 2>/dev/null || die "$home cannot be written by user $(id -u); once, as root: chown $(id -u) $home"

case "${1:---help}" in
  lab)
    shift
    token="${JUPYTER_TOKEN:-}"
    if [ "$ip" != 127.0.0.1 ] && [ "${#token}" -lt 16 ]; then
      die "JupyterLab on $ip needs JUPYTER_TOKEN with 16 characters or more (python -c 'import secrets; print(secrets.token_hex(24))')"
    fi
    if [ -z "${JUPYTER_TOKEN:-}" ]; then
      file="$home/.jupyter_token"
      [ -s "$file" ] || (umask 077 && python -c 'import secrets; print(secrets.token_hex(24))' > "$file")
      JUPYTER_TOKEN="$(cat "$file")"
      echo "astrobio-pod: the token is in $file" >&2
    fi
    export JUPYTER_TOKEN  # read by Jupyter from its environment: it appears in no list of processes
    cd "$home/notebooks"
    exec jupyter lab --no-browser --ServerApp.ip="$ip" --ServerApp.port="$port" --ServerApp.root_dir="$home" --ServerApp.allow_remote_access=True \
      --ServerApp.log_level=WARN "$@"
    ;;
  keep)
    run="${2:-${ASTROBIO_RUN:-}}"
    [ -f "$run/job.toml" ] || die "there is no job.toml in '$run'; write one with astrobio launch recipe"
    exec python -c 'import sys; from astrobio.train.launch import keep; keep(sys.argv[1])' "$run"
    ;;
  *) exec astrobio "$@" ;;
esac
