#!/usr/bin/env bash
# bash launch/local_cluster.sh N COMMAND...: N processes of COMMAND on this machine, joined by gloo. What process 0
# prints is shown as it is, what the others print with [1] and so on in front. When one fails, the others have GRACE_S
# (60) seconds to say why they stop; the exit status is that of the first that failed. Ctrl-C asks all to save and
# stop; a second one kills them.
set -uo pipefail
n="${1:-}" grace="${GRACE_S:-60}"
if ! [[ "$n" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "usage: bash launch/local_cluster.sh N COMMAND..., as: 2 python -m pcgjax.train --config=... --workdir=..." >&2
  exit 2
fi
shift
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
port=$((20000 + RANDOM % 12000))
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
pids=() status=0 deadline=0
# shellcheck disable=SC2329  # called by the trap
stop() {
  if [ "$deadline" = 0 ]; then deadline=$((SECONDS + grace)); else deadline=$SECONDS; fi
  kill -TERM "${pids[@]}" 2>/dev/null
}
trap stop INT TERM
# Each line in one piece, however many write at once.
said_by() {
  trap '' INT TERM
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}
for ((i = 0; i < n; i++)); do
  command=("$@" --coordinator_address="127.0.0.1:$port" --num_processes="$n" --process_id="$i")
  if [ "$i" = 0 ]; then
    "${command[@]}" &
  else
    "${command[@]}" > >(said_by "$i") 2> >(said_by "$i" >&2) &
  fi
  pids+=("$!")
done
# A signal that came before they all were known reached only some.
if [ "$deadline" != 0 ]; then kill -TERM "${pids[@]}" 2>/dev/null; fi
while [ "${#pids[@]}" -gt 0 ]; do
  sleep 0.2
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    code=$?
    unset "pids[i]"
    if [ $status = 0 ]; then status=$code; fi
    if [ $code != 0 ] && [ $deadline = 0 ]; then deadline=$((SECONDS + grace)); fi
  done
  if [ $deadline != 0 ] && [ $SECONDS -ge $deadline ]; then kill -KILL "${pids[@]}" 2>/dev/null; fi
done
exit $status
