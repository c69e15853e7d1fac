"""Flags, and the one line that training at NaN ends with."""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import tfbilevel as tb
from data_prep.command_line import seed

# What `--jit` may be, and what Keras's `jit_compile` calls it.
JIT = {"auto": "auto", "on": True, "off": False}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit status 2.

    Flags that every experiment has are there from the start: `--out`, `--resume`,
    `--seed`.
    """

    def __init__(self, **keywords: Any):
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **keywords,
        )
        self.add_argument("--out", type=pathlib.Path, required=True, help="folder")
        self.add_argument(
            "--resume", action="store_true", help="continue the run in --out"
        )
        self.add_argument("--seed", type=seed, default=0, help="of everything random")

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)

    def warn(self, message: str) -> None:
        """One line on standard error; the run goes on."""
        print(f"{self.prog}: warning: {message}", file=sys.stderr)

    def reject_unused_flags(
        self,
        args: argparse.Namespace,
        published: Sequence[Any],
        chosen: str,
        ignored: Container[str] = (),
    ) -> None:
        """An error for a flag that was given and that none of the settings knows.

        Args:
            args: the parsed flags, `None` where not given.
            published: dataclasses of settings, `None` where they have no such setting.
            chosen: what chose them, such as "--method rhg".
            ignored: names of flags that the published script takes and ignores there:
                a warning is enough.
        """
        for field in dataclasses.fields(published[0]):
            unknown = all(getattr(one, field.name) is None for one in published)
            if getattr(args, field.name) is None or not unknown:
                continue
            meaningless = f"{flag(field.name)} means nothing to {chosen}"
            if field.name not in ignored:
                self.error(f"{meaningless}: leave it out")
            self.warn(f"{meaningless}, which goes on without it")

    def reject_ineffective_flags(
        self, args: argparse.Namespace, needs: Mapping[str, tuple[bool, str]]
    ) -> None:
        """An error for a flag that was given and would change nothing.

        Args:
            args: the parsed flags, `None` where not given.
            needs: name -> (whether it changes something here, what it needs to).
        """
        for name, (met, need) in needs.items():
            if getattr(args, name) is not None and not met:
                self.error(f"{flag(name)} needs {need}: leave it out")


def flag(name: str) -> str:
    """A setting's name as it is written on the command line."""
    return "--" + name.replace("_", "-")


def filled(args: argparse.Namespace, published: Any) -> argparse.Namespace:
    """The flags, with published settings where none was given.

    Settings that are `None` stay `None`, whatever the flag: they have no such setting.
    """
    made = argparse.Namespace(**vars(args))
    for name, value in dataclasses.asdict(published).items():
        if value is None or getattr(args, name) is None:
            setattr(made, name, value)
    return made


def settings(args: argparse.Namespace, *hidden: str) -> dict[str, Any]:
    """The flags that decide a run's results, by name."""
    hidden = ("out", "resume", *hidden)
    return {k: v for k, v in sorted(vars(args).items()) if k not in hidden}


@contextlib.contextmanager
def one_line_nonfinite() -> Iterator[None]:
    """Training that meets NaN or infinity: one line, exit status 1."""
    try:
        yield
    except tb.NonFiniteError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def at_least(kind: type, least: float) -> Callable[[str], Any]:
    """An argparse type: a finite number of this kind, not below `least`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = f"{kind.__name__} of at least {least}"
    return parse


def share(text: str) -> float:
    """An argparse type: a number above zero and at most one."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to below 1, such as a momentum."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def finite(text: str) -> float:
    """An argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value
