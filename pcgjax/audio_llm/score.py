"""What an audio LLM's answers are worth, beside baselines that need no audio, in tables like the paper's.

    python -m pcgjax.audio_llm.score --workdir=RUN[,RUN2] --model=DIR --out=DIR [--part=test]
        [--zero_shot=cinc2016:DIR,pascal:DIR] [--segments=cinc2016:DIR,pascal:DIR]
    python -m pcgjax.audio_llm.score --model=DIR --prepared=DIR --out=DIR

The first scores the best adapter of each run on its own front end, the second a checkpoint as it is. The answer to a
question is the most probable of the six letters, read from one forward pass. Three things stand beside it: the class of
most people in training (the majority), the same questions on the audio of somebody else (shuffled audio), and the
figures of the paper, "Exploring Finetuned Audio-LLM on Heart Murmur Features", Tables 1 to 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from pcgjax.data import splits
from pcgjax.runtime import files

ZERO_SHOT = ("cinc2016", "pascal")


def folders(flag: str, words: Sequence[str]) -> dict[str, str]:
    """{data set: folder} from words such as cinc2016:DIR.

    Raises:
      ValueError: a word of another form, or another data set than those of ZERO_SHOT.
    """
    folder_of = {}
    for word in words:
        dataset, colon, folder = word.partition(":")
        if not colon or not folder or dataset not in ZERO_SHOT:
            raise ValueError(f"--{flag}={word}: need DATASET:DIR with one of {', '.join(ZERO_SHOT)}")
        folder_of[dataset] = folder
    return folder_of


def main(argv: list[str]) -> None:
    if bool(FLAGS.workdir) == bool(FLAGS.prepared):
        raise app.UsageError("give --workdir=RUN to score a run, or --prepared=DIR to score the checkpoint itself")
    zero_shots, segments = folders("zero_shot", FLAGS.zero_shot), folders("segments", FLAGS.segments)
    files.check_out(FLAGS.out, folder=True)
    # Not above: --help needs neither JAX nor PyTorch.
    from pcgjax.audio_llm.comparison import score
    from pcgjax.pages.audio_llm import summary

    results = score(FLAGS.model, FLAGS.workdir, FLAGS.out, FLAGS.part, FLAGS.prepared, zero_shots, segments)
    print(summary(results))
    print(f"wrote {FLAGS.out}: metrics.json, predictions.csv, report.html")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A local folder with the Qwen2-Audio checkpoint.", required=True)
    flags.DEFINE_list("workdir", [], "Folders that pcgjax.audio_llm.train wrote; the best adapter of each is scored.")
    flags.DEFINE_string(
        "prepared", "", "Without --workdir: a folder that pcgjax.prepare wrote; all of it is asked about."
    )
    flags.DEFINE_string("out", None, "The folder for metrics.json, predictions.csv and report.html.", required=True)
    flags.DEFINE_enum("part", "test", splits.PARTS, "The part of each run's split to score.")
    flags.DEFINE_list(
        "zero_shot", [], "cinc2016:DIR, pascal:DIR, official layouts: normal or abnormal, never trained on."
    )
    flags.DEFINE_list(
        "segments", [], "cinc2016:DIR, pascal:DIR: their .tsv files, for runs with another front end than none."
    )
    files.run(main)
