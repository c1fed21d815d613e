#!/usr/bin/env bash
# bash docs/picture.sh [RUN]: draws the top of RUN/report.html (default: runs/quickstart, which launch/quickstart.sh
# leaves) as docs/report.png. Needs Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
run="$(realpath "${1:-runs/quickstart}")"
[ -e "$run/report.html" ] || { echo "error: $run/report.html is missing; run bash launch/quickstart.sh first" >&2; exit 1; }
profile="$(mktemp -d)"
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1180,694 --user-data-dir="$profile" \
  --virtual-time-budget=4000 --screenshot="$PWD/docs/report.png" "file://$run/report.html" 2>/dev/null
