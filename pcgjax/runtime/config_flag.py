"""--config=NAME[:VARIANT] or FILE.py[:VARIANT], and --config.part.field=value, looked at before absl parses them.

Of what is wrong with them absl and ml_collections raise half a dozen kinds of errors, some of which accuse another
word than the one that was misspelt.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import runpy
from collections.abc import Container, Sequence
from typing import Any

import ml_collections

from pcgjax.runtime.names import nearest

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"  # in a clone a link to its folder configs/


def path_of(name: str) -> pathlib.Path:
    """The file that --config=NAME means: a path as it is, else the config of that name that comes with the package.

    Raises:
      ValueError: a name alone, and no such config.
    """
    path = pathlib.Path(name)
    if path.suffix == ".py" or len(path.parts) != 1:
        return path
    if not (CONFIGS / f"{name}.py").is_file():
        there = sorted(one.stem for one in CONFIGS.glob("*.py"))
        raise ValueError(f"--config={name}: no config of this name; {nearest(name, there, 'there are')}")
    return CONFIGS / f"{name}.py"


def config_of(path: str | pathlib.Path, variant: str = "") -> Any:
    """What a config file's get_config returns, for a variant of it where one is given.

    Raises:
      ValueError: no such file, no Python, no get_config, no such variant, or what get_config raises; one line.
    """
    path = pathlib.Path(path)
    given = f"{path}:{variant}" if variant else str(path)
    if not path.is_file():
        fix = f"; give --config={path.stem}" if (CONFIGS / path.name).is_file() else _beside(path)
        raise ValueError(f"{path}: {'a folder, not a config file' if path.is_dir() else 'no such file'}{fix}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: not Python ({error.msg})") from error
    except Exception as error:  # whatever a config file does
        raise ValueError(f"{path}: it ends with {type(error).__name__}: {error}") from error
    if not callable(get_config):
        raise ValueError(f"{path}: has no function get_config, which returns the config; see {CONFIGS / 'cnn.py'}")
    try:
        config = get_config(*([variant] if variant else []))
    except ValueError as error:
        raise ValueError(str(error) if f"{path.name}:" in str(error) else f"{given}: {error}") from error
    except TypeError as error:
        if variant and error.__traceback__ is not None and error.__traceback__.tb_next is None:  # of the call itself
            raise ValueError(f"{given}: this config has no variants; give {path}") from error
        raise ValueError(f"{given}: get_config ends with TypeError: {error}") from error
    except Exception as error:
        raise ValueError(f"{given}: get_config ends with {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"{given}: get_config returns a {type(config).__name__}, not a ConfigDict")
    return config


def _beside(path: pathlib.Path) -> str:
    """The config files in a folder, or beside a file that is not there, for the end of a message."""
    folder, word = (path, path.name) if path.is_dir() else (path.parent, path.stem)
    try:
        there = [one.stem for one in folder.glob("*.py")]
    except OSError:
        there = []
    return f"; {nearest(word, sorted(there), 'there are')}" if there else ""


def refused(words: Sequence[str], there: Container[str]) -> str:
    """What is wrong with the command's --config and --config.FIELD words; "": nothing.

    words: the command line without the program; there: the names of the command's flags.
    """
    if "config" not in there:
        return ""
    at, fields = _config_words(words)
    if at is None:
        return f"--config.{fields[0]} without --config; give --config=NAME before it" if fields else ""
    given = _given(words, at)
    if not given:
        return "--config: give a name or a file, as --config=cnn"
    name, _, variant = given.partition(":")
    try:
        config = config_of(path_of(name), variant)
    except ValueError as error:
        return str(error)
    return next(filter(None, (_no_field(config, field) for field in fields)), "")


def with_path(words: Sequence[str], there: Container[str]) -> list[str]:
    """The words, with the file of a config that is given by its name in the name's place."""
    at, _ = _config_words(words) if "config" in there else (None, [])
    if at is None or not (given := _given(words, at)):
        return list(words)
    name, colon, variant = given.partition(":")
    rest = at + 1 if "=" in words[at] else at + 2
    return [*words[:at], f"--config={path_of(name)}{colon}{variant}", *words[rest:]]


def help_of(words: Sequence[str], there: Container[str]) -> str:
    """Of a command line that asks for help and gives a config: its fields, their values, and the comments on them in
    the config's file and in the files of this package that it imports; "": nothing is asked or given."""
    at, _ = _config_words(words) if "config" in there else (None, [])
    if at is None or not {"--help", "-help", "-h", "-?", "--helpshort", "--helpfull"} & {*words}:
        return ""
    name, _, variant = _given(words, at).partition(":")
    path = path_of(name)
    comments, lines = comments_of(path), []
    for field, value in _fields(config_of(path, variant)).items():
        comment = f"  # {comments[field]}" if field in comments else ""
        lines.append(f"  --config.{field}={value}{comment}")
    return "\n".join([f"\nThe fields of --config={_given(words, at)}:", *lines])


def comments_of(path: pathlib.Path) -> dict[str, str]:
    """{"train.epochs": the comment behind its line} in a config file and in the files of this package it imports."""
    source = path.read_text(encoding="utf-8")
    comments: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcgjax."):
            spec = importlib.util.find_spec(node.module or "")
            if spec and spec.origin:
                comments |= comments_of(pathlib.Path(spec.origin))
    for line in source.splitlines():
        if found := re.match(r"\s*(config\.[\w.]+(?:, config\.[\w.]+)*) = .*?  # (.+)", line):
            comments |= {name.removeprefix("config."): found[2] for name in found[1].split(", ")}
    return comments


def _fields(config: Any, above: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, ml_collections.ConfigDict)
        fields |= _fields(value, f"{above}{name}.") if inner else {f"{above}{name}": value}
    return fields


def _given(words: Sequence[str], at: int) -> str:
    """What word `at` gives --config: behind its = or in the next word; "": nothing."""
    _, equals, value = words[at].partition("=")
    following = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("-") else ""
    return value if equals else following


def _config_words(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """(where --config is, the fields of the --config.FIELD words)."""
    at, fields = None, []
    for i, word in enumerate(words):
        if word == "--":
            break
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("-"):
            continue
        if name == "config":
            at = i
        elif name.startswith("config."):
            fields.append(name.removeprefix("config."))
        elif name.startswith("noconfig."):
            fields.append(name.removeprefix("noconfig."))
    return at, fields


def _no_field(config: Any, field: str) -> str:
    """What is wrong with a field's name; "": it is there."""
    at: list[str] = []
    inner = config
    for name in field.split("."):
        name = name.partition("[")[0]  # an element of a tuple
        if not isinstance(inner, ml_collections.ConfigDict):
            return f"--config.{field}: {'.'.join(at)} is a field, not a part"
        if name not in inner:
            where = f"the config's part {'.'.join(at)}" if at else "the config"
            return f"--config.{field}: {where} has no part or field {name!r}; {nearest(name, sorted(inner.keys()))}"
        at, inner = [*at, name], inner[name]
    if isinstance(inner, ml_collections.ConfigDict):
        return f"--config.{field}: a part, not a field; it has {', '.join(map(str, sorted(inner.keys())))}"
    return ""
