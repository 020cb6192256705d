"""Parameters that take one of a few values: checked when they are set, with the choices in the message."""

from collections.abc import Collection, Sequence

from harness.errors import UserError


def one_of(parameter: str, value: object, choices: Collection[str]) -> None:
    """Raise UserError unless `value` is one of the choices; `parameter` is its full name, as `warmup.levels`."""
    if value not in choices:
        raise UserError(f"{parameter}={value}: choose one of {', '.join(choices)}")


def some_of(parameter: str, values: Sequence[str], choices: Collection[str]) -> None:
    """Raise UserError unless `values` is a list of one or more of the choices."""
    if isinstance(values, str) or not values or any(value not in choices for value in values):
        shown = values if isinstance(values, str) else f"[{','.join(map(str, values))}]"
        raise UserError(f"{parameter}={shown}: give a list of one or more of {', '.join(choices)}")
