#!/usr/bin/env bash
# Installs what the tests need and runs them all: style, types, behaviour.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  --help | -h) echo "bash launch/test.sh [--slow] [pytest arguments]: --slow adds the tests that take minutes"; exit 0 ;;
  --slow) shift; set -- -m "" "$@" ;;
  *) set -- -m "not slow" "$@" ;;
esac
extras=dev
source launch/install.sh
# The report is looked at in a browser; without one that test says that it was skipped.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "== installing chromium"
  (apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 || echo "chromium could not be installed"
fi
ruff check .
mypy
export JAX_PLATFORMS=cpu
python -m pytest -n auto --dist worksteal "$@"
