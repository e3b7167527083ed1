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

from pipeline.config import Section, Settings, merged, of_one_task


class ConfigError(ValueError):
    """A setting is wrong. The message is one line."""


def load_settings(files: Path | Sequence[Path], overrides: Sequence[str] = ()) -> Settings:
    """Read yaml files, of which later ones win, apply `key.sub=value` overrides, validate; the variants of a study too.

    A file that names another task than those before it takes nothing from their section task.

    Raises:
        ConfigError: one line that names the key, its file (or the command line) and what is allowed.
    """
    given: list[tuple[str, DictConfig]] = []
    values: dict[str, Any] = {}
    for file in [files] if isinstance(files, Path) else files:
        read = _read(file)
        more: Any = OmegaConf.to_container(read)
        values = merged(of_one_task(values, more), more)
        given.append((str(file), read))
    from_files, from_command_line = OmegaConf.create(values), _parse_overrides(overrides)
    names = " and ".join(name for name, _ in given)
    try:
        whole: Any = OmegaConf.to_container(OmegaConf.merge(from_files, from_command_line), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{names}: {' '.join(str(error).split())}") from None
    try:
        settings = Settings.model_validate(whole)
    except ValidationError as error:
        problem, path = _first(error)
        if _overridden(problem, path, from_files, from_command_line):
            where = "the command line"
        else:
            where = next((name for name, read in reversed(given) if _holds(read, path)), names)
        key = ".".join(path) or "settings of several sections"
        raise ConfigError(f"{key} (set in {where}): {_explain(problem, path)}") from None
    for name in settings.study.variants:
        vary(settings, name, settings.study.seeds[0])
    return settings


def vary(settings: Settings, name: str, seed: int) -> Settings:
    """Those of a study's run: of one variant, with one seed. Its folder stands in that of the study.

    Raises:
        ConfigError: one line that names the variant, the key and what is allowed.
    """
    changes = settings.study.variants[name]
    run = changes.get("run")
    of_all = [f"run.{key}" for key in ("name", "root", "cache", "seed") if isinstance(run, dict) and key in run]
    if of_all := [*of_all, *(key for key in ("study",) if key in changes)]:
        raise ConfigError(f"study.variants.{name}: {of_all[0]} is the same for the whole study and not for a variant to set")
    values = settings.model_dump()
    values = merged(of_one_task(values, changes), changes) | {"study": {}}
    if isinstance(values["run"], dict):
        root = f"{settings.run.root.rstrip('/')}/{settings.run.name}"
        values["run"] |= {"name": f"{name}-{seed}", "root": root, "seed": seed}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem, path = _first(error)
        key = f" {'.'.join(path)}:" if path else ""
        raise ConfigError(f"study.variants.{name}:{key} {_explain(problem, path)}") from None


def _read(file: Path) -> DictConfig:
    try:
        found = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {file}") from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no yaml file: {' '.join(str(error).split())}") from None
    if not isinstance(found, DictConfig):
        raise ConfigError(f"{file} must hold keys and values at its top level")
    return found


def _first(error: ValidationError) -> tuple[Any, list[str]]:
    """The first problem, and the keys that lead to it."""
    problem = error.errors(include_url=False)[0]
    loc = problem["loc"]
    keys = loc[:1] + loc[2:] if loc[:1] == ("task",) else loc  # behind `task` stands the task's name
    return problem, [str(part) for part in keys]


def _holds(given: DictConfig, path: Sequence[str]) -> bool:
    """Whether a file says anything of a key, or of the section whose key it leaves out."""
    found: Any = OmegaConf.to_container(given)
    for part in path[:1] if len(path) == 1 else path[:-1]:
        if not isinstance(found, dict) or part not in found:
            return False
        found = found[part]
    return bool(path)


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
