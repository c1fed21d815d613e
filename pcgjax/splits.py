"""Makes a split of a prepared folder, or checks one for leaks.

python -m pcgjax.splits --prepared=DIR --kind=person --target=abnormal --out=split.json
python -m pcgjax.splits --prepared=DIR --check=split.json
"""

from __future__ import annotations

from typing import Any

from absl import flags

from pcgjax.data.shards import read_rows
from pcgjax.data.splits import KINDS, TARGETS, SplitError, leaks, load, make, save, summary
from pcgjax.runtime import files


def main(flags_: Any) -> int:
    _, rows = read_rows(flags_.prepared)
    if flags_.check:
        split = load(flags_.check, rows)
    else:
        if not (flags_.kind and flags_.target is not None and flags_.out):
            raise SplitError("give --kind, --target and --out to make a split, or --check=FILE to check one")
        fractions = [float(fraction) for fraction in flags_.fractions]
        split = make(
            rows,
            flags_.kind,
            flags_.target,
            flags_.seed,
            fractions,
            flags_.fold,
            flags_.folds,
            flags_.database,
            flags_.names,
        )
        save(split, flags_.out)
    found = leaks(split, rows)
    print(summary(split))
    print("\n".join(f"LEAK: {message}" for message in found) or "no leaks found")
    return 1 if found else 0


if __name__ == "__main__":
    flags.DEFINE_string("prepared", None, "The folder that python -m pcgjax.prepare wrote.", required=True)
    flags.DEFINE_enum("kind", None, KINDS, "How to divide: see pcgjax/data/splits.py, make.")
    flags.DEFINE_enum("target", None, TARGETS, "The label to stratify by; recordings without it are set aside.")
    flags.DEFINE_string("out", None, "The JSON file to write.")
    flags.DEFINE_string("check", None, "A split's JSON file: check it for leaks instead of making one.")
    flags.DEFINE_integer("seed", 0, "Seed of the random draw.")
    flags.DEFINE_list("fractions", ["0.7", "0.15", "0.15"], "Of train,validation,test; sum 1.")
    flags.DEFINE_integer("fold", 0, "person_kfold: the fold that tests; the next one validates.")
    flags.DEFINE_integer("folds", 5, "person_kfold: how many.")
    flags.DEFINE_string("database", None, "leave_database_out: the one to test on.")
    flags.DEFINE_string("names", None, "paper301: a text or csv file whose first column names the test recordings.")
    files.run(lambda _: main(flags.FLAGS))
