"""How well the classical chain finds S1 and S2 in a prepared data set that has them annotated.

    python -m pcgjax.classical --prepared=DIR

`pcgjax.train --config=configs/classical.py` trains the chain.
"""

from __future__ import annotations

from absl import flags

from pcgjax.runtime import files

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    from pcgjax.classical.picking import picking_by_database
    from pcgjax.data.corpus import from_prepared

    for line in picking_by_database(from_prepared(FLAGS.prepared)):
        print(line)


if __name__ == "__main__":
    flags.DEFINE_string(
        "prepared", None, "A folder that pcgjax.prepare wrote, with annotated S1 and S2.", required=True
    )
    files.run(main)
