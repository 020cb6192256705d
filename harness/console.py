"""What a person reads while a command runs."""

from rich.console import Console

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    OUT.print(text, markup=False)


def say_error(text: str) -> None:
    ERR.print(text, markup=False)
