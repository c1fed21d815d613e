# shellcheck shell=bash
# Sourced by the scripts beside it: makes and enters .venv with the pinned versions. $extras: more extras, as "dev".
PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer is needed; $("$PYTHON" --version) was found. Set PYTHON=/path/to/python3.11" >&2
  exit 1
}
wanted="${extras:-}"
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
  case "$(nvidia-smi)" in *"CUDA Version: 12"*) wanted="$wanted,cuda" ;; *) wanted="$wanted,cuda13" ;; esac
elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then
  wanted="$wanted,tpu"
fi
stamp="$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16) $wanted"
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
  echo "== installing into .venv${wanted:+ with: $wanted} (a few minutes the first time)"
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${wanted:+[${wanted#,}]}"
  echo "$stamp" >.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
