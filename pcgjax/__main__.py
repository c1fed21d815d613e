"""The command pcgjax: `pcgjax NAME ...` is `python -m pcgjax.NAME ...`.

pcgjax                 lists the commands
pcgjax configs         lists the configs that come with the package: --config=NAME
pcgjax train --config=cnn --workdir=runs/cnn --config.data.prepared=DIR
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import runpy
import sys

from pcgjax import __version__
from pcgjax.runtime.config_flag import CONFIGS
from pcgjax.runtime.names import nearest

COMMANDS = ("prepare", "train", "evaluate", "predict", "report", "splits", "sites", "reproduce", "ablation", "bench",
            "classical", "datasets.synthetic", "audio_llm.train", "audio_llm.score", "audio_llm.merge",
            "audio_llm.questions", "audio_llm.make_tiny")  # fmt: skip


def first_line(path: pathlib.Path) -> str:
    """The first sentence of a Python file's docstring, without running it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def listed(files: dict[str, pathlib.Path]) -> str:
    width = max(map(len, files))
    return "\n".join(f"  {name:{width}}  {first_line(path)}" for name, path in files.items())


def file_of(command: str) -> pathlib.Path:
    spec = importlib.util.find_spec(f"pcgjax.{command}")
    assert spec is not None
    assert spec.origin is not None
    path = pathlib.Path(spec.origin)
    return path.with_name("__main__.py") if path.name == "__init__.py" else path


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print("pcgjax COMMAND [--help] [flags]\n\ncommands:", listed({one: file_of(one) for one in COMMANDS}), sep="\n")
        print("  configs: the configs that come with the package, for --config=NAME")
        return 0
    if name == "--version":
        print(f"pcgjax {__version__}")
        return 0
    if name == "configs":
        print(listed({path.stem: path for path in sorted(CONFIGS.glob("*.py"))}))
        return 0
    if name not in COMMANDS:
        print(f"error: pcgjax {name}: no such command; {nearest(name, COMMANDS, 'there are')}", file=sys.stderr)
        return 1
    del sys.argv[1]
    runpy.run_module(f"pcgjax.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
