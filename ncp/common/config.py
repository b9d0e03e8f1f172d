"""One parser for YAML files and command lines.

A configuration is a dataclass whose fields are made with `option`. `parse` reads `--config FILE` and
`--any_key value`, and checks both against the same types and ranges. The command line overrides the file.
Unknown keys are refused. Both write a list as in YAML, `--key "[a, b]"`; text without brackets is one item.
Every mistake is a `UserError`: one line that says what is wrong, where, and what would be right.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from ncp.common.errors import TOKEN, UserError
from ncp.common.files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def option(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    group: str | None = None,
) -> Any:
    """A dataclass field with its documentation and range.

    choices: accepted values (for a list: of its items). low, high: inclusive bounds. above: exclusive lower bound.
    A field without a default is required. group: the heading in the documentation for this key and the keys after it,
    up to the next key that has a group.
    """
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above, "group": group}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str | None = None) -> T:
    """Builds `cls` from `--config FILE` and `--key value` arguments (default: `sys.argv[1:]`).

    Raises UserError for an unknown or repeated key, a wrong type or value, or a missing file or key.
    If `cls` has a method `check`, it is called last, for rules that span several keys.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    for group, members in grouped(cls).items():
        section = parser.add_argument_group(group or "keys")
        for field in members:
            text = f"{field.metadata['doc']} ({accepted(field, hints[field.name])}; {default_of(field)})"
            # A bare --flag means true; everything else needs its value.
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if hints[field.name] is bool else {}
            section.add_argument(
                f"--{field.name}", default=dataclasses.MISSING, metavar="VALUE", help=text.replace("%", "%%"), **flag
            )
    known, rest = parser.parse_known_args(argv)
    if rest:
        name = rest[0].split("=")[0]
        raise UserError(f"command line: unknown argument {name}{_nearest(name.lstrip('-'), [*fields, 'config'], '--')}")

    values: dict[str, Any] = {}
    if known.config is not None:
        for name, value in read_yaml(known.config).items():
            if name not in fields:
                raise UserError(f"{known.config}: unknown key '{name}'{_nearest(str(name), fields)}")
            values[name] = _convert(value, hints[name], fields[name], f"{known.config}: {name}")
    for name, field in fields.items():
        if (text := getattr(known, name)) is not dataclasses.MISSING:
            where = f"command line: --{name}"
            value = _as_in_yaml(text, where) if _is_list(hints[name]) else text
            values[name] = _convert(value, hints[name], field, where)
        elif (
            name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ):
            raise UserError(f"{known.config or 'command line'}: '{name}' is missing ({field.metadata['doc']})")
    config = cls(**values)
    if hasattr(config, "check"):
        config.check()
    return config


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if it cannot be read, is no mapping, or repeats a key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the config file ({getattr(error, 'strerror', None) or error})") from None
    try:
        content = yaml.load(text, _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date, such as 2023-02-30
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected lines of 'key: value', found a {type(content).__name__}")
    return content


def save_yaml(config: Any, path: Path) -> None:
    """Writes a configuration or a mapping as YAML. `parse` reads a configuration back to the same values."""
    content = config if isinstance(config, dict) else dataclasses.asdict(config)
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


# ---------------------------------------------------------------- documentation


def grouped(cls: type) -> dict[str, list[dataclasses.Field]]:
    """The keys of a configuration by group, in the order of help, documentation and config files.

    A subclass's key joins the group of the same name, if there is one. Keys before the first group are under "".
    """
    groups: dict[str, list[dataclasses.Field]] = {}
    name = ""
    for field in dataclasses.fields(cls):
        name = field.metadata["group"] or name
        groups.setdefault(name, []).append(field)
    return groups


def accepted(field: dataclasses.Field, hint: Any) -> str:
    """The values that a key accepts, in words: its type, and its range or choices. hint: the type annotation."""
    inner, optional = _unwrap(hint)
    low, high, above, choices = (field.metadata[k] for k in ("low", "high", "above", "choices"))
    text = _show(inner)
    if choices is not None:
        text = ("list of: " if _is_list(inner) else "one of: ") + ", ".join(map(as_text, choices))
    elif low is not None and high is not None:
        text += f" from {as_text(low)} to {as_text(high)}"
    else:
        bounds = {"at least": low, "more than": above, "at most": high}
        named = [f"{words} {as_text(bound)}" for words, bound in bounds.items() if bound is not None]
        text += ", " + " and ".join(named) if named else ""
    return f"{text}, or null" if optional else text


def default_of(field: dataclasses.Field) -> str:
    """'default: VALUE' or 'required'."""
    if field.default_factory is not dataclasses.MISSING:
        return f"default: {as_text(field.default_factory())}"
    return "required" if field.default is dataclasses.MISSING else f"default: {as_text(field.default)}"


def as_text(value: Any) -> str:
    """A key's value as written in YAML, but without quotes around text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_text, value))}]"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.15g}".replace("e-0", "e-")
    return str(value)


# ---------------------------------------------------------------- conversion

_SHORT = reprlib.Repr()  # for messages: a few bytes of YAML (aliases) can expand to gigabytes
_SHORT.maxstring = _SHORT.maxother = 200


def _convert(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    """`value` converted to type `hint` and checked against the field's range.

    value: from YAML, or text from the command line.
    """
    inner, optional = _unwrap(hint)
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none", "") and optional):
        if optional:
            return None
        raise UserError(f"{where} is empty; expected {_show(hint)}")
    if _is_list(hint):
        (item_type,) = typing.get_args(inner)
        return [_scalar(item, item_type, field, where) for item in (value if isinstance(value, list) else [value])]
    return _scalar(value, inner, field, where)


def _is_list(hint: Any) -> bool:
    return typing.get_origin(_unwrap(hint)[0]) is list


def _as_in_yaml(text: str, where: str) -> Any:
    """The value of `text` after 'key: ' in a YAML file. Raises UserError if it is not valid YAML."""
    try:
        content = yaml.load(f"key: {text}", _UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        content = {}
    if list(content) != ["key"]:
        example = "[first, second], or \"['one, with: odd signs']\""
        raise UserError(f"{where} is {_SHORT.repr(text)}, which YAML cannot read; a list is written {example}")
    return content["key"]


def one_item_each(key: str, items: Sequence[str]) -> None:
    """Raises UserError for an item that looks like several items: a, b without the brackets of a list."""
    for item in items:
        if "," in item:
            raise UserError(f"{key}: '{item}' is one item; several are written [{', '.join(re.split(', *', item))}]")


def _scalar(value: Any, kind: Any, field: dataclasses.Field, where: str) -> Any:
    def wrong() -> UserError:
        hint = " (quote it if a word was meant)" if kind is str and isinstance(value, bool) else ""
        return UserError(f"{where} is {_SHORT.repr(value)}; expected {_show(kind)}{hint}")

    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if not isinstance(value, bool) and (not isinstance(value, str) or value.lower() not in words):
            raise wrong()
        result: Any = value if isinstance(value, bool) else words[value.lower()]
    elif kind in (int, float):
        if isinstance(value, (bool, list, dict)):
            raise wrong()
        try:
            # YAML 1.1 reads 1e-8 as a string, so text is parsed here too.
            result = float(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong() from None
        if not math.isfinite(result) or (kind is int and result != int(result)):
            raise wrong()
        result = kind(value) if isinstance(value, int) else kind(result)  # int() of a float would lose digits
    else:
        if isinstance(value, (bool, list, dict)):
            raise wrong()
        result = str(value)
        if "\0" in result or any("\ud800" <= c <= "\udfff" for c in result):  # not valid in a path, or in UTF-8
            raise wrong()
        if TOKEN.search(result):  # a token would end up in config.yaml and the model card
            raise UserError(f"{where} holds an access token; log in with 'hf auth login' or set HF_TOKEN instead")

    limits = field.metadata
    if limits["choices"] is not None and result not in limits["choices"]:
        names = ", ".join(map(str, limits["choices"]))
        raise UserError(f"{where} is {result!r}; expected one of: {names}")
    for bound, broken, words_ in (
        ("low", lambda b: result < b, "at least"),
        ("high", lambda b: result > b, "at most"),
        ("above", lambda b: result <= b, "more than"),
    ):
        if limits[bound] is not None and broken(limits[bound]):
            raise UserError(f"{where} is {result}; expected {words_} {limits[bound]}")
    return result


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return hint, False


def _show(hint: Any) -> str:
    inner, optional = _unwrap(hint)
    if _is_list(inner):
        name = f"list of {_show(typing.get_args(inner)[0])}"
    else:
        name = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(inner, str(inner))
    return f"{name} or null" if optional else name


def _nearest(name: str, known: Any, prefix: str = "") -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{match[0]}?" if match else "; --help lists the known ones"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"command line: {message}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a repeated key. PyYAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
