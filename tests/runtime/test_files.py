"""Commands: their help is light, their log is our own, what was compiled is kept; files appear whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest

import pcgjax
from pcgjax.runtime import files

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = pathlib.Path(pcgjax.__file__).parent
# What no command needs to print its help.
HEAVY = ("jax", "jaxlib", "orbax", "flax", "optax", "torch", "transformers", "sklearn", "librosa")
DOORS = ("train", "prepare", "evaluate", "predict", "report", "sites", "splits", "ablation", "reproduce", "bench")
IN_A_COMMAND = """
import json, os, pathlib, runpy, sys
door, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(door, run_name="__main__", alter_sys=True)
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def run_python(code: str, *words: str, cwd: pathlib.Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A fresh process of `code`, which sees this tree."""
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_help_loads_nothing_heavy(door):
    process = run_python(IN_A_COMMAND, f"pcgjax.{door}", "--help")
    assert process.stdout.startswith(("\n", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")), process.stdout + process.stderr
    assert f"python -m pcgjax.{door}" in process.stdout
    assert not set(HEAVY) & set(json.loads(process.stderr.splitlines()[-1]))


def test_a_field_that_is_not_there_is_one_line_and_loads_nothing_heavy():
    words = ("--workdir=W", "--config=configs/cnn.py", "--config.train.epoch=2")
    process = run_python(IN_A_COMMAND, "pcgjax.train", *words)
    modules, error = process.stderr.splitlines()
    assert process.returncode == 1
    assert not set(HEAVY) & set(json.loads(modules))
    assert error.startswith(
        "error: --config.train.epoch: the config's part train has no part or field 'epoch'; nearest: epochs; it has "
    )


CACHED = """
import sys
from pcgjax.runtime import files

def main(argv):
    assert "jax" not in sys.modules
    import jax
    print(jax.config.jax_compilation_cache_dir)

files.run(main)
"""


def test_what_is_compiled_is_cached_though_main_imports_jax(tmp_path):
    unset = run_python(CACHED, JAX_COMPILATION_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path / "home"))
    assert unset.stdout.strip() == str(tmp_path / "home" / "pcgjax" / "xla"), unset.stderr
    given = run_python(CACHED, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "given"), XDG_CACHE_HOME=str(tmp_path / "home"))
    assert given.stdout.strip() == str(tmp_path / "given"), given.stderr
    before = run_python(f"import jax\n{CACHED.replace('assert', '0 and')}", JAX_COMPILATION_CACHE_DIR="",
                        XDG_CACHE_HOME=str(tmp_path / "home"))  # fmt: skip
    assert before.stdout.strip() == str(tmp_path / "home" / "pcgjax" / "xla"), before.stderr


def test_a_program_compiled_by_one_command_is_found_by_the_next(tmp_path):
    code = """
from pcgjax.runtime import files

def main(argv):
    import jax, jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum())

files.run(main)
"""
    process = run_python(code, JAX_COMPILATION_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert list((tmp_path / "pcgjax" / "xla").iterdir())


@pytest.mark.parametrize(("path", "level", "kept"), [
    (PACKAGE / "training" / "loop.py", logging.INFO, True),
    (PACKAGE / "train.py", logging.DEBUG, True),
    # A clone in a folder of the package's name, its environment inside.
    (PACKAGE.parent / "venv" / "site-packages" / "orbax" / "checkpoint.py", logging.INFO, False),
    (pathlib.Path("/home/me/pcgjax/.venv/lib/jax/_src/compiler.py"), logging.INFO, False),
    (pathlib.Path(f"{PACKAGE}_other") / "module.py", logging.INFO, False),
    (pathlib.Path("/home/me/pcgjax/.venv/lib/jax/_src/compiler.py"), logging.WARNING, True),
])  # fmt: skip
def test_the_log_is_this_packages_own_and_warnings(path, level, kept):
    record = logging.LogRecord("any", level, str(path), 1, "text", None, None)
    assert files.own_or_warning(record) is kept


def test_a_clone_in_a_folder_of_the_packages_name_logs_its_own_lines_only(tmp_path):
    clone = tmp_path / "pcgjax"
    clone.mkdir()
    (clone / "pcgjax").symlink_to(PACKAGE)
    (clone / "other.py").write_text("from absl import logging\ndef tell(): logging.info('of another package')\n")
    code = """
import sys
from absl import logging
from pcgjax.runtime import files, distributed
import other

def main(argv):
    logging.set_verbosity(logging.INFO)
    other.tell()
    code = compile("logging.info('our own')", files.PACKAGE + "any.py", "exec")
    exec(code)

files.run(main)
"""
    process = run_python(code, cwd=clone, PYTHONPATH=str(clone))
    assert process.returncode == 0, process.stderr
    assert "our own" in process.stderr
    assert "of another package" not in process.stderr


ENDS = """
import sys
from pcgjax.runtime import files

def main(argv):
    exec(argv[1], {})

files.run(main, words=True)
"""


@pytest.mark.parametrize(("code", "status", "line"), [
    ("raise ValueError('one\\ntwo')", 1, "error: one two"),
    ("raise KeyboardInterrupt", 130, "interrupted; the same command goes on from what is saved, if anything is"),
    ("raise MemoryError", 1, "error: out of memory (MemoryError); take smaller"),
    ("import numpy; numpy.ones(2**50)", 1, "error: out of memory (Unable to allocate 8.00 PiB"),
    ("{}['a']", 1, "error: KeyError: 'a'; --verbosity=1 shows the traceback"),
    ("from pcgjax.runtime import names; names.nearest(5, ['a'])", 1, "error: AttributeError: 'int' object has no "
     "attribute 'lower' (at pcgjax/runtime/names.py, line "),
    ("f = lambda: f(); f()", 1, "error: RecursionError: "),
    ("import torch_of_nobody", 1, "error: needs the package torch_of_nobody, which is not installed here; pip install"),
    ("import sys; sys.modules['torch'] = None; import torch", 1, "error: needs the package torch, which is not "
     'installed here; pip install "pcgjax[audio-llm]"'),
    ("b'\\xff'.decode()", 1, "error: 'utf-8' codec can't decode byte 0xff"),
    ("open('/no/such/file')", 1, "error: /no/such/file: No such file or directory"),
    ("open('/')", 1, "error: /: Is a directory"),
    ("raise OSError('words alone')", 1, "error: words alone"),
    ("import sys; sys.exit(7)", 7, ""),
    ("print('a\\udcffb.wav')", 0, ""),
])  # fmt: skip
def test_R11_whatever_ends_a_command_is_one_line(code, status, line):
    process = run_python(ENDS, code)
    assert process.returncode == status, process.stderr
    assert process.stderr.startswith(line)
    assert process.stderr.count("\n") == bool(line)
    traced = run_python(ENDS, code, "--verbosity=1")
    assert ("Traceback" in traced.stderr) is (status == 1)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_R11_a_platform_that_is_not_there(platform):
    process = run_python(ENDS, "import jax; jax.devices()", JAX_PLATFORMS=platform)
    assert process.returncode == 1
    error = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, process.stderr
    assert error[0].startswith(f"error: JAX_PLATFORMS={platform}: JAX finds no such device here")
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("words", [["print('x' * 10**6)"], ["[print(i) for i in range(10**5)]"], ["", "--help"]])
def test_R11_a_reader_who_is_gone(words):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", ENDS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
                          cwd=ROOT, text=True) as process:  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (1, 141)


def test_where_a_result_cannot_be_written_is_asked_before(tmp_path):
    (tmp_path / "file").write_text("")
    for good, folder in (("new", False), ("a/b/new", True), ("file", False), (".", True)):
        files.check_out(tmp_path / good, folder)
    for bad, folder, message in ((".", False, "a folder; give a file"), ("file", True, "a file; give a folder"),
                                 ("file/x", False, "file is no folder"), ("file/x", True, "is no folder")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            files.check_out(tmp_path / bad, folder)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "inner" / "a.txt"
    files.write_text(path, "whole")

    def interrupted() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


BACKGROUND = """
import sys, threading
from absl import logging
from pcgjax.runtime import files

def main(argv):
    def body():
        raise OSError(28, "No space left on device", "f")
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    try:
        raise RuntimeError("what another library\\nsays at length")
    except RuntimeError:
        logging.exception("it failed")
    class Odd:
        def __del__(self):
            raise ValueError("ignored")
    Odd()
    raise ValueError('OUT_OF_RANGE: Error writing "x" in OCDBT database at local file "d"')

files.run(main)
"""


def test_what_others_log_and_what_ends_a_thread_is_a_line():
    process = run_python(BACKGROUND)
    lines = process.stderr.splitlines()
    assert process.returncode == 1
    assert len(lines) == 3, process.stderr
    assert lines[0].endswith("a background thread ended: f: No space left on device")
    assert lines[1].endswith("it failed")
    assert lines[2].startswith("error: a checkpoint could not be written (OUT_OF_RANGE: ")
    assert lines[2].endswith("; make room on that disk; the same command goes on from the last whole checkpoint")
    verbose = BACKGROUND.replace("import sys, ", "import sys; sys.argv.append('-v=1'); import ")
    assert "Traceback" in run_python(verbose).stderr


SWALLOWED = """
import gc, os, signal, time
from pcgjax.runtime import files

def main(argv):
    class Odd:
        def __del__(self):  # as JAX's callback of the garbage collector
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
    Odd()
    time.sleep(5)
    print("went on")

files.run(main)
"""
IMPORTING = """
from pcgjax.runtime import files

def main(argv):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("Encountered an error while initializing the extension.") from error

files.run(main)
"""


@pytest.mark.parametrize("code", [SWALLOWED, IMPORTING], ids=["swallowed", "importing"])
def test_ctrl_c_that_another_library_swallows(code):
    process = run_python(code)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == "interrupted; the same command goes on from what is saved, if anything is\n"
