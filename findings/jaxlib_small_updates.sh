#!/usr/bin/env bash
# bash findings/jaxlib_small_updates.sh: a CPU loop that writes one number a step into a long array, as a `lax.scan`
# with stacked outputs does, takes time by the square of its length in jaxlib 0.11.1, and by its length in 0.11.2.
# Needs Python 3.12 or newer (PYTHON=/path/to/it) and a package index; makes and removes a venv of its own. Exits with
# status 1 where the versions behave otherwise. Reported upstream as jax issue 40101, with a threshold of 256 bytes.
#
# Guess, written before the first run: twice the length takes about 4 times as long in 0.11.1 and about twice in
# 0.11.2; at 100,000 steps 0.11.1 is over 100 times as slow; with 256 bytes a step (64 numbers) both are linear.
# Outcome, Python 3.12.1 on 2 busy CPU cores: 4.5 times as long for twice the length in 0.11.1, 1.9 in 0.11.2; at 100,000
# steps 0.11.1 took 4.5 s and 0.11.2 .8 ms. With 64 numbers a step four times the length took 5 and 10 times as long.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
cat >"$folder/measure.py" <<'PY'
import json, sys, time
import jax, jax.numpy as jnp, jaxlib

def seconds(steps, width):
    def step(x, _):
        x = 0.9 * x + 1.0
        return x, x
    run = jax.jit(lambda x: jax.lax.scan(step, x, None, length=steps)[1])
    x = jnp.zeros(width) if width > 1 else jnp.zeros(())
    run(x).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)

answer = {"jaxlib": jaxlib.__version__, "short": seconds(50_000, 1), "long": seconds(100_000, 1),
          "wide_short": seconds(10_000, 64), "wide_long": seconds(40_000, 64)}
print(json.dumps(answer))
PY
for version in 0.11.1 0.11.2; do
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "jax==$version" "jaxlib==$version" numpy==2.4.6 scipy==1.17.1 ml_dtypes==0.6.0 opt_einsum==3.4.0
  JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/measure.py" | tee -a "$folder/answers"
done
"$folder/venv/bin/python" - "$folder/answers" <<'PY'
import json, sys
old, new = map(json.loads, open(sys.argv[1]))
growth = lambda a: a["long"] / a["short"]
print(f"one number a step, 50,000 to 100,000 steps: {growth(old):.1f} times as long in 0.11.1, "
      f"{growth(new):.1f} in 0.11.2; 100,000 steps: 0.11.1 takes {old['long'] / new['long']:.0f} times as long")
print(f"64 numbers a step, 10,000 to 40,000 steps: {old['wide_long'] / old['wide_short']:.1f} times as long in 0.11.1, "
      f"{new['wide_long'] / new['wide_short']:.1f} in 0.11.2")
sys.exit(not (old["long"] > 20 * new["long"]))
PY
