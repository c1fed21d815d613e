"""An adapter worked into its base weights: a plain checkpoint that transformers loads without PEFT and without us.

python -m pcgjax.audio_llm.merge --model=DIR --adapter=RUN/checkpoints/best-STEP/adapter --out=DIR
"""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile

from absl import flags

from pcgjax.audio_llm import make_tiny
from pcgjax.runtime import files, hashes

MADE_FROM = "merged_from.json"
# Of the base: its weights, replaced here or pickled, `make_tiny`'s mark that the folder may be overwritten, what an
# earlier merge said of it, and hidden files.
_LEFT_OUT = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", make_tiny.MARKER,
             MADE_FROM, hashes.NAME, ".*")  # fmt: skip


def merge(model: str | pathlib.Path, adapter: str | pathlib.Path, out: str | pathlib.Path) -> pathlib.Path:
    """Writes the folder `out`, whole or not at all, and returns it.

    W + alpha / rank B A for every adapted W, in the type that the weights of `model` are stored in (bfloat16, float16,
    else float32) and under the names they have there; all its other files are copied as they are. Beside them
    merged_from.json: the base's fingerprint, the SHA-256 of the adapter's tensors and config, the version; and
    hashes.json, which `model.load` checks. float16 takes twice its size in memory.

    Raises:
      ValueError: `out` is a file, or a folder with something in it.
      OSError: it cannot be written.
      ModelError (also DamagedError): as `model.load` and `model.with_adapter`, or a sum that its type cannot hold.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    import pcgjax
    from pcgjax.audio_llm import adapter_files, weights
    from pcgjax.audio_llm import model as llm

    folder, out = pathlib.Path(model), pathlib.Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already; give --out a new or an empty folder")
    # Adapter and base are looked at before 17 GB are read.
    adapter = pathlib.Path(adapter)
    for path, needed in ((folder, "config.json"), (adapter, "adapter_config.json")):
        if not (path / needed).is_file():
            raise llm.ModelError(
                f"{path}: no {needed} there; --model takes a checkpoint, --adapter what training wrote"
            )
    llm.check_adapter(adapter)
    stored = _stored_type(folder)
    # float16 is no type to load in here: float32 holds all of its values.
    base, _ = llm.load(folder, "float32" if stored == "float16" else stored, "sdpa")
    adapted = llm.with_adapter(base, adapter)
    files_of_adapter = (adapter_files.WEIGHTS, adapter_files.CONFIG)
    made_from = {
        "base": {"fingerprint": adapted.base_fingerprint, "name": folder.resolve().name},
        "adapter": {name: hashes.of_file(adapter / name) for name in files_of_adapter},
        "pcgjax": pcgjax.__version__,
    }
    merged = adapted.merge_and_unload().to(getattr(torch, stored))
    weights.refuse_not_finite(out, merged.named_parameters(), f"{stored} cannot hold it; store the base in another")
    with safe_open(weights.weight_files(folder)[0], "pt") as file:
        older = not any(name.startswith("model.") for name in file.keys())  # noqa: SIM118
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as parent:
        new = pathlib.Path(parent) / "new"
        try:
            merged.save_pretrained(new, save_original_format=older)
        except SafetensorError as error:  # a full disk, in safetensors' words
            raise OSError(f"{out}: cannot be written: {weights.one_line(error)}") from None
        for path in folder.iterdir():
            if path.is_file() and not any(path.match(pattern) for pattern in _LEFT_OUT):
                shutil.copyfile(path, new / path.name)
        (new / MADE_FROM).write_text(json.dumps(made_from, indent=1) + "\n")
        hashes.write(new)
        new.rename(out)
    return out


def _stored_type(folder: pathlib.Path) -> str:
    """The type that all weights of a checkpoint have on disk, whatever its config.json says: float32, bfloat16 or
    float16. float32 where they have several, or another."""
    from safetensors import SafetensorError, safe_open

    from pcgjax.audio_llm.weights import weight_files

    types = set()
    try:
        for path in weight_files(folder):
            with safe_open(path, "pt") as file:
                types |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        pass  # `model.load` says what is wrong with it
    return {("BF16",): "bfloat16", ("F16",): "float16"}.get(tuple(types), "float32")


def main(argv: list[str]) -> None:
    out = merge(FLAGS.model, FLAGS.adapter, FLAGS.out)
    print(f"wrote {out}: transformers.Qwen2AudioForConditionalGeneration.from_pretrained loads it")


FLAGS = flags.FLAGS
if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "The local folder with the Qwen2-Audio checkpoint it was trained on.", required=True
    )
    flags.DEFINE_string("adapter", None, "The adapter's folder, checkpoints/best-STEP/adapter of a run.", required=True)
    flags.DEFINE_string("out", None, "The folder to write, new or empty.", required=True)
    files.run(main)
