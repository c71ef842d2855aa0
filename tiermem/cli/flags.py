"""Flags that commands share, as decorators. Owns how a row of the option table becomes a flag; reads no value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from tiermem.config import BY_KEY, Option

Function = TypeVar("Function", bound=Callable[..., Any])

json_flag = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, in base units.")
"""Adds `--json`, the argument `as_json`."""


def config_flags(*keys: str) -> Callable[[Function], Function]:
    """Adds the flags of these rows. Each becomes the argument of its key, None where it is not given, unparsed text
    otherwise: collect them as `**flags` and hand them to `load_config`, which knows the types and words the errors."""

    def decorate(function: Function) -> Function:
        for key in reversed(keys):
            function = _flag(BY_KEY[key])(function)
        return function

    return decorate


address_flag = config_flags("address")
"""Adds `--address`, the argument `address`."""


def _flag(option: Option) -> Callable[[Function], Function]:
    text = option.help + (f" [{option.env}]" if option.env else "")
    if option.kind.noun == "SWITCH":
        return click.option(f"{option.flag}/--no-{option.flag[2:]}", option.key, default=None, help=text)
    if option.kind.many:
        return click.option(option.flag, option.key, metavar=option.kind.noun, help=text, multiple=True, default=None,
                            callback=lambda _context, _parameter, values: values or None)  # fmt: skip
    return click.option(option.flag, option.key, metavar=option.kind.noun, help=text)
