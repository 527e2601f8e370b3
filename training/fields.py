"""Reads a recipe, a strict dataclass, from a dict, a YAML file or the command line.

recipe.yaml ─┐
             ├─ RecipeFields.from_command_line ─ the record, checked
--field value┘
"""

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError

from ..configuration_mome import did_you_mean, listed, quoted, shortened
from ..errors import LONGEST_REASON, MomeError, RecipeError, first_line


class RecipeFields:
    """Base class of recipes: dataclasses with `@strict` whose docstring has an `Args:` section."""

    PROGRAM: ClassVar[str]  # the module that runs such recipes
    PURPOSE: ClassVar[str]  # a sentence for `--help`

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The recipe with these fields, the others at their defaults.

        Raises:
            RecipeError: an unknown field, a missing one, a wrong type, an impossible value.
        """
        known = {each.name: each.type for each in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                hint = did_you_mean(name, known, f"the fields are {listed(known)}, see --help")
                raise RecipeError(f"unknown recipe field {quoted(name)}: {hint}")
        required = [each.name for each in dataclasses.fields(cls) if _is_required(each)]
        if missing := [name for name in required if values.get(name) is None]:
            raise RecipeError(f"the recipe lacks {' and '.join(missing)}")
        try:
            return cls(**{name: _as_number(value, known[name]) for name, value in values.items()})
        except StrictDataclassFieldValidationError as error:
            name = next(name for name in known if f"field '{name}'" in str(error))
            wanted = getattr(known[name], "__name__", None) or known[name]
            wanted = known[name] if typing.get_args(known[name]) else wanted
            raise RecipeError(f"recipe field {name}={quoted(values[name])}: expected {wanted}") from None
        except StrictDataclassError as error:
            if isinstance(error.__cause__, MomeError):
                raise error.__cause__ from None
            raise

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> Self:
        """The recipe in a file, with some fields replaced; raises what `from_dict` raises."""
        try:
            values = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise RecipeError(f"no recipe {quoted(path)}") from None
        except (OSError, ValueError) as error:  # a folder, a name that no file can have, no UTF-8
            raise RecipeError(f"recipe {quoted(path)} can't be read: {first_line(error)}") from None
        except yaml.YAMLError as error:
            reason = shortened(" ".join(str(error).split()), LONGEST_REASON)
            raise RecipeError(f"{path} is not valid YAML: {reason}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{path} holds no fields: write lines of `field: value`")
        return cls.from_dict(values | (overrides or {}))

    @classmethod
    def from_command_line(cls, arguments: Sequence[str] | None = None) -> Self:
        """`--config recipe.yaml [--field value ...]`; values are read as YAML, so lists and dicts work too.

        Exits with status 2 and one line for whatever `from_dict` and `from_yaml` raise.
        """
        parser = cls._parser()
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            known = [f"--{each.name}" for each in dataclasses.fields(cls)]
            parser.error(f"unknown field {quoted(unknown[0])}: {did_you_mean(unknown[0], known, 'see --help')}")
        overrides = vars(options)
        config = overrides.pop("config")
        try:
            return cls.from_dict(overrides) if config is None else cls.from_yaml(config, overrides)
        except MomeError as error:
            parser.error(str(error))

    @classmethod
    def _parser(cls) -> argparse.ArgumentParser:
        # Not transformers' HfArgumentParser: it has no values for dicts, for `null` and for lists as YAML writes them.
        parser = argparse.ArgumentParser(
            prog=cls.PROGRAM,
            usage=f"accelerate launch -m {cls.PROGRAM} --config recipe.yaml [--field value ...]",
            description=f"{cls.PURPOSE} Any field of the recipe can be given as --field value.",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38),
            allow_abbrev=False,
        )
        parser.add_argument("--config", metavar="FILE", help="the recipe, a YAML file")
        explanations = explanations_of(cls)
        for each in dataclasses.fields(cls):
            flag = {"nargs": "?", "const": True} if each.type is bool else {}
            text = f"{explanations.get(each.name, '')} ({_default_of(each)})".replace("%", "%%")
            options = {"default": argparse.SUPPRESS, "type": yaml.safe_load, "metavar": "VALUE", "help": text}
            parser.add_argument(f"--{each.name}", **options, **flag)
        return parser


def explanations_of(documented: type) -> dict[str, str]:
    """What a class's docstring says about each argument in its `Args:` section."""
    section = (inspect.getdoc(documented) or "").partition("Args:\n")[2].partition("\n\n")[0]
    explanations = {}
    for entry in re.split(r"\n(?= {4}\S)", section):
        names, _, text = " ".join(entry.split()).partition(": ")
        explanations |= dict.fromkeys(names.split(", "), text.rstrip("."))
    return explanations


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _default_of(field: dataclasses.Field) -> str:
    if _is_required(field):
        return "required"
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"default: {value if isinstance(value, str) else json.dumps(value)}"  # as YAML writes it


def _as_number(value: Any, annotation: Any) -> Any:
    """YAML reads `1e-3` as text and `1` as an integer; both are fine where a float is wanted."""
    choices = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if float in choices and int not in choices and not isinstance(value, bool):
        if isinstance(value, (int, str)):
            try:
                return float(value)
            except ValueError:
                return value
    if annotation == list[float] and isinstance(value, list):
        return [_as_number(each, float) for each in value]
    return value
