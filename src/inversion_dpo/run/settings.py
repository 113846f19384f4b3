"""What the fields say about themselves, in words: ranges, defaults, effects, commented YAML."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import yaml
from pydantic import TypeAdapter

from inversion_dpo.run.fields import Config
from inversion_dpo.run.limits import MOST, TAGS, Effect

_LIMITS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True)
class Setting:
    """One setting; ``range`` says in words what may stand there, ``choices`` lists it if it can."""

    key: str
    text: str
    range: str
    default: Any
    choices: tuple[str, ...]
    effect: Effect | None

    @property
    def needs(self) -> str:
        """Say when it has an effect; nothing if always."""
        when = self.effect.when if self.effect else ""
        for plain, words in {r"\d+": "NUMBER", ".*": "*", "\\": "", "!=": " other than "}.items():
            when = when.replace(plain, words)
        return " ".join(TAGS.get(word, word) for word in when.split(" "))

    @property
    def by_method(self) -> bool:
        """Whether the method decides if it has an effect."""
        return self.effect is not None and not TAGS.keys().isdisjoint(self.effect.when.split(" "))


@cache
def every_setting() -> dict[str, Setting]:
    """Dotted key -> setting, in the order of the configuration."""
    return {setting.key: setting for setting in _settings_of(Config(), "")}


@cache
def groups() -> dict[str, str]:
    """Dotted name of a group -> what its settings are about."""
    names = dict.fromkeys(key.rpartition(".")[0] for key in every_setting())
    return {name: str(type(attrgetter(name)(Config())).__doc__) for name in names}


def _settings_of(group: Any, before: str) -> Iterator[Setting]:
    schemas = TypeAdapter(type(group)).json_schema()["properties"]
    for name, info in type(group).__pydantic_fields__.items():
        default, schema = getattr(group, name), schemas[name]
        if is_dataclass(default):
            yield from _settings_of(default, f"{before}{name}.")
            continue
        effects = [m for m in info.metadata if isinstance(m, Effect)]
        yield Setting(
            f"{before}{name}",
            info.description or "",
            range_of(schema),
            default,
            tuple(
                word for part in (schema, *schema.get("anyOf", ())) for word in part.get("enum", ())
            ),
            effects[0] if effects else None,
        )


def range_of(schema: dict[str, Any]) -> str:
    """Say what a JSON schema allows."""
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "anyOf" in schema:
        return " or ".join(range_of(part) for part in schema["anyOf"])
    if schema["type"] == "array":
        entries = range_of(schema["items"]).replace("text", "texts").replace("a number", "numbers")
        return f"a list of {'one or more ' if schema.get('minItems') else ''}{entries}"
    if schema["type"] == "object":
        return f"names, each with {range_of(schema['additionalProperties'])}"
    kind = _TYPES[schema["type"]]
    if "examples" in schema:
        return f"{kind} such as {schema['examples'][0]}"
    if schema.get("maximum") == MOST:  # which stands for no limit
        schema = {k: v for k, v in schema.items() if k != "maximum"}
    if "minimum" in schema and "maximum" in schema:
        return f"{kind} from {schema['minimum']} to {schema['maximum']}"
    limits = [f"{words} {schema[word]}" for word, words in _LIMITS.items() if word in schema]
    return " ".join([kind, " and ".join(limits)]).strip()


def written(value: Any) -> str:
    """Write a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(k)}: {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    bare = not isinstance(value, str) or re.fullmatch(r"[A-Za-z][\w./:-]*(?<!:)", value, re.ASCII)
    text = yaml.safe_dump(value, default_style=None if bare else '"', width=math.inf)
    return str(text).removesuffix("\n").removesuffix("\n...")


def commented(config: Any, idle: Collection[str]) -> str:
    """Write YAML to start from, each setting with its sentence; ``idle`` keys commented out."""
    lines: list[str] = []
    for group, about in groups().items():
        depth = "  " * group.count(".")
        lines += ["", f"{depth}# {about}", f"{depth}{group.rpartition('.')[2]}:"]
        for key, setting in every_setting().items():
            if key.rpartition(".")[0] != group:
                continue
            notes = [setting.text, f"({setting.range}; default {written(setting.default)})"]
            notes += [f"Without effect here: it needs {setting.needs}."] * (key in idle)
            for note in notes:
                lines += textwrap.wrap(
                    note, 98, initial_indent=f"{depth}  # ", subsequent_indent=f"{depth}  #   "
                )
            line = f"{key.rpartition('.')[2]}: {written(attrgetter(key)(config))}"
            lines.append(f"{depth}  {'# ' if key in idle else ''}{line}")
    return "\n".join(lines[1:]) + "\n"
