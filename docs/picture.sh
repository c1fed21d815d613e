#!/usr/bin/env bash
# bash docs/picture.sh [RUN]: draws the top of RUN/report.html (default: runs/quickstart, which launch/quickstart.sh
# leaves) as docs/report.png. Needs Chromium and the environment .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
run="$(realpath "${1:-runs/quickstart}")"
[ -e "$run/report.html" ] || { echo "error: $run/report.html is missing; run bash launch/quickstart.sh first" >&2; exit 1; }
export PATH="$PWD/.venv/bin:$PATH"
shot="$(mktemp -d)"
trap 'rm -rf "$shot"' EXIT
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1180,900 --user-data-dir="$shot/profile" \
  --virtual-time-budget=4000 --screenshot="$shot/page.png" "file://$run/report.html" 2>/dev/null
# 128 colours: a third of the size.
python -c 'import sys; from PIL import Image
Image.open(sys.argv[1]).convert("RGB").quantize(128).save("docs/report.png", optimize=True)' "$shot/page.png"
