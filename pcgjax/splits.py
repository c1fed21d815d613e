"""Makes a split of a prepared folder, or checks one for leaks.

python -m pcgjax.splits --prepared=DIR --kind=person --target=abnormal --out=split.json
python -m pcgjax.splits --prepared=DIR --check=split.json
"""

from __future__ import annotations

from absl import flags

from pcgjax.data.shards import read_rows
from pcgjax.data.splits import KINDS, SplitError, leaks, load, make, save, summary
from pcgjax.runtime import files


def main(argv: list[str]) -> int:
    f = flags.FLAGS
    try:
        fractions = [float(fraction) for fraction in f.fractions]
    except ValueError:
        raise SplitError(f"--fractions={','.join(f.fractions)}: give numbers, as 0.7,0.15,0.15") from None
    _, rows = read_rows(f.prepared)
    if f.check:
        split = load(f.check, rows)
    else:
        if not (f.kind and f.target is not None and f.out):
            raise SplitError("give --kind, --target and --out to make a split, or --check=FILE to check one")
        files.check_out(f.out)
        split = make(rows, f.kind, f.target, f.seed, fractions, f.fold, f.folds, f.database, f.names)
        save(split, f.out)
    messages = leaks(split, rows)
    print(summary(split))
    print("\n".join(f"LEAK: {message}" for message in messages) or "no leaks found")
    return 1 if messages else 0


if __name__ == "__main__":
    flags.DEFINE_string("prepared", None, "The folder that python -m pcgjax.prepare wrote.", required=True)
    flags.DEFINE_enum("kind", None, KINDS, "How to divide: see pcgjax/data/splits.py, make.")
    flags.DEFINE_string("target", None, "The label to stratify by, as abnormal; recordings without it are set aside.")
    flags.DEFINE_string("out", None, "The JSON file to write.")
    flags.DEFINE_string("check", None, "A split's JSON file: check it for leaks instead of making one.")
    flags.DEFINE_integer("seed", 0, "Seed of the random draw.", 0, 2**31 - 1)
    flags.DEFINE_list("fractions", ["0.7", "0.15", "0.15"], "Of train,validation,test; sum 1.")
    flags.DEFINE_integer("fold", 0, "person_kfold: the fold that tests; the next one validates.")
    flags.DEFINE_integer("folds", 5, "person_kfold: how many.")
    flags.DEFINE_string("database", None, "leave_database_out: the one to test on.")
    flags.DEFINE_string("names", None, "paper301: a text or csv file whose first column names the test recordings.")
    files.run(main)
