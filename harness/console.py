"""What a person reads while a command runs."""

from rich.console import Console

_OUT = Console(highlight=False, soft_wrap=True)
_ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    _OUT.print(text, markup=False)


def say_error(text: str) -> None:
    _ERR.print(text, markup=False)
