"""--config=FILE.py[:VARIANT] and --config.part.field=value, looked at before absl parses them.

Of what is wrong with them absl and ml_collections raise half a dozen kinds of errors, some of which accuse another
word than the one that was misspelt.
"""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Container, Sequence
from typing import Any

import ml_collections

from pcgjax.runtime.names import nearest


def config_of(path: str | pathlib.Path, variant: str = "") -> Any:
    """What a config file's get_config returns, for a variant of it where one is given.

    Raises:
      ValueError: no such file, no Python, no get_config, no such variant, or what get_config raises; one line.
    """
    path = pathlib.Path(path)
    given = f"{path}:{variant}" if variant else str(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a config file' if path.is_dir() else 'no such file'}{_beside(path)}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: not Python ({error.msg})") from error
    except Exception as error:  # whatever a config file does
        raise ValueError(f"{path}: it ends with {type(error).__name__}: {error}") from error
    if not callable(get_config):
        raise ValueError(f"{path}: has no function get_config, which returns the config; see configs/cnn.py")
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
    given, fields = "", []
    for i, word in enumerate(words):
        if word == "--":
            break
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            continue
        if name == "config":
            following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("-") else ""
            given = value if equals else following
            if not given:
                return "--config: give a file, as --config=configs/cnn.py"
        elif name.startswith("config."):
            fields.append(name.removeprefix("config."))
        elif name.startswith("noconfig."):
            fields.append(name.removeprefix("noconfig."))
    if not given:
        return f"--config.{fields[0]} without --config; give --config=configs/NAME.py before it" if fields else ""
    path, _, variant = given.partition(":")
    try:
        config = config_of(path, variant)
    except ValueError as error:
        return str(error)
    return next(filter(None, (_no_field(config, field) for field in fields)), "")


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
