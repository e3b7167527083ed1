"""Settings from a yaml file and `key.sub=value` overrides, back to yaml, and as text for `--help`. Imports neither torch nor ray.

Every mistake becomes one line that names the key, where it was set and what is allowed.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from pipeline.config import Section, Settings


class ConfigError(ValueError):
    """A setting is wrong. The message is one line."""


def load_settings(file: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a yaml file, apply `key.sub=value` overrides, validate.

    Raises:
        ConfigError: one line that names the key, its file (or the command line) and what is allowed.
    """
    try:
        from_file = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {file}") from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no yaml file: {' '.join(str(error).split())}") from None
    if not isinstance(from_file, DictConfig):
        raise ConfigError(f"{file} must hold keys and values at its top level")
    from_command_line = _parse_overrides(overrides)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(from_file, from_command_line), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        loc = problem["loc"]
        path = [str(part) for part in (loc[:1] + loc[2:] if loc[:1] == ("task",) else loc)]  # behind `task` stands the task's name
        where = "the command line" if _overridden(problem, path, from_file, from_command_line) else str(file)
        key = ".".join(path) or "settings of several sections"
        raise ConfigError(f"{key} (set in {where}): {_explain(problem, path)}") from None


def dump_settings(settings: Settings) -> str:
    """The resolved configuration as yaml; `load_settings` reads it back to the same settings."""
    return OmegaConf.to_yaml(OmegaConf.create(settings.model_dump(mode="json")))


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        key, sign, _ = text.partition("=")
        if not sign or not key or not all(part.isidentifier() for part in key.split(".")):
            raise ConfigError(f"override {text!r} is not of the form key.sub=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {overrides}: {' '.join(str(error).split())}") from None


def _overridden(problem: Any, path: Sequence[str], from_file: DictConfig, from_command_line: DictConfig) -> bool:
    """Whether the command line is at fault: it set the value, or keys of a section that do not go together with it."""
    given: Any = OmegaConf.to_container(from_command_line)
    for part in path:
        if not isinstance(given, dict):
            return True  # a list, given as a whole
        if part not in given:
            return False
        given = given[part]
    if not isinstance(given, dict):
        return True
    try:
        Settings.model_validate(OmegaConf.to_container(from_file))
    except ValidationError as error:
        return all((alone["loc"], alone["msg"]) != (problem["loc"], problem["msg"]) for alone in error.errors())
    return True


def _explain(problem: Any, path: Sequence[str]) -> str:
    """What is allowed there, in words, with the value that stood there."""
    if problem["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], problem)
        return f"no such key; known here: {', '.join(known)}"
    if problem["type"] == "union_tag_invalid":
        return f"name must be {problem['ctx']['expected_tags']}, not '{problem['ctx']['tag']}'"
    shown = repr(problem["input"])
    value = "" if isinstance(problem["input"], dict) else f", not {shown[:60]}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{message}{value}"


def _fields_at(path: Sequence[str], problem: Any) -> list[str]:
    model: Any = Settings
    for part in path:
        if typing.get_origin(model) is dict:  # of sections by a name of the user's
            model = typing.get_args(model)[1]
            continue
        model = model.model_fields[part].annotation
        if typing.get_origin(model) in (typing.Union, types.UnionType):
            members = _models_of(model)
            chosen = problem["loc"][1]  # behind `task` stands the task's name
            named = (
                [m for m in members if chosen in typing.get_args(m.model_fields["name"].annotation)]
                if len(members) > 1
                else members
            )
            model = named[0]
    return list(model.model_fields)


def describe_settings() -> str:
    """All settings, one a line, with default and meaning: what `--help` shows."""
    lines: list[str] = []
    _describe(Settings, Settings(), "", lines)
    return "\n".join(lines)


def _describe(model: Any, given: Section | None, prefix: str, lines: list[str]) -> None:
    """`given` is the section that stands there by default, whose values may differ from the defaults of its class."""
    for name, field in model.model_fields.items():
        members = _models_of(field.annotation)
        value = getattr(given, name) if given else field.default
        for member in members:
            _describe(member, value if isinstance(value, member) else None, f"{prefix}{name}.", lines)
        if not members or value is None:  # a section may be absent
            default = "" if field.is_required() else f"={'null' if value is None else value}"
            lines.append(f"  {prefix}{name}{default}".ljust(44) + f"  {field.description}")


def _models_of(annotation: Any) -> list[Any]:
    """The sections that a field may hold; none for a plain setting, or for sections by a name of the user's."""
    if typing.get_origin(annotation) is dict:
        return []
    parts = typing.get_args(annotation) or (annotation,)
    return [part for part in parts if isinstance(part, type) and issubclass(part, Section)]
