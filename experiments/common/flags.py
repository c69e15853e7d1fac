"""Command-line flags, and one-line errors for training that becomes NaN."""

import argparse
import contextlib
import dataclasses
import datetime
import math
import pathlib
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import tfbilevel as tb
from data_prep.command_line import seed

# Values of `--jit`, and those of Keras's `jit_compile`.
JIT = {"auto": "auto", "on": True, "off": False}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit status 2.

    The flags common to all experiments are added at once: `--out`, `--resume`,
    `--seed`. Without `--out` the folder is `runs/NAME-DATE-TIME`, named after the
    script.
    """

    def __init__(self, **keywords: Any):
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **keywords,
        )
        self.add_argument(
            "--out", type=pathlib.Path, help="folder; default: runs/NAME-DATE-TIME"
        )
        self.add_argument(
            "--resume", action="store_true", help="continue the run in --out"
        )
        self.add_argument("--seed", type=seed, default=0, help="for all random choices")

    def parse_known_args(self, *arguments: Any, **keywords: Any) -> Any:
        args, unknown = super().parse_known_args(*arguments, **keywords)
        if args.out is None:
            if args.resume:
                self.error("--resume needs --out FOLDER, that of the run to continue")
            # With milliseconds: a shell may start several at once.
            now = datetime.datetime.now().isoformat("-", "milliseconds")
            moment = now.replace(":", "").replace(".", "-")
            args.out = pathlib.Path("runs", f"{pathlib.Path(self.prog).stem}-{moment}")
        return args, unknown

    def add_data_flags(self, folder: str) -> None:
        """Add `--data-dir` and `--download`, for scripts whose data are in files.

        Args:
            folder: what `--data-dir` is, for its help text.
        """
        self.add_argument("--data-dir", type=pathlib.Path, help=folder)
        self.add_argument(
            "--download",
            action="store_true",
            default=None,  # as every flag that was not given
            help="fetch the data set, if it is not there",
        )

    def choose_dataset(
        self,
        args: argparse.Namespace,
        published: str,
        is_there: Callable[[str], bool],
        otherwise: str,
    ) -> str | None:
        """Choose the data set if no flag did: the published one, if it can be had.

        With `--data-dir` or `--download` it is the published one in any case.

        Args:
            args: the parsed flags, whose `dataset` is set.
            published: the data set of the published experiment.
            is_there: whether a data set is where it is looked for without flags.
            otherwise: a data set that needs no files.

        Returns:
            A warning if it is the other one, for `warn` when all flags are checked.
        """
        if args.dataset is not None:
            return None
        asked = args.data_dir is not None or args.download
        args.dataset = published if asked or is_there(published) else otherwise
        if args.dataset == published:
            return None
        return (
            f"{published} is not on this machine: --dataset {otherwise} is used "
            f"(--download fetches {published}, --data-dir says where it is)"
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)

    def warn(self, message: str | None) -> None:
        """Print one line on standard error, unless there is nothing to say."""
        if message is None:
            return
        print(f"{self.prog}: warning: {message}", file=sys.stderr)

    def reject_unused_flags(
        self,
        args: argparse.Namespace,
        published: Sequence[Any],
        chosen: str,
        ignored: Container[str] = (),
    ) -> None:
        """Raise an error for a flag that was given but is used by none of the settings.

        Args:
            args: the parsed flags, `None` if not given.
            published: dataclasses of settings, `None` for settings they do not have.
            chosen: the flag that chose them, such as "--method rhg".
            ignored: names of flags that the published script accepts and ignores: they
                only cause a warning.
        """
        for field in dataclasses.fields(published[0]):
            unknown = all(getattr(one, field.name) is None for one in published)
            if getattr(args, field.name) is None or not unknown:
                continue
            meaningless = f"{flag(field.name)} has no effect with {chosen}"
            if field.name not in ignored:
                self.error(f"{meaningless}: leave it out")
            self.warn(f"{meaningless}: it is ignored")

    def reject_ineffective_flags(
        self, args: argparse.Namespace, needs: Mapping[str, tuple[bool, str]]
    ) -> None:
        """Raise an error for a flag that was given but would change nothing.

        Args:
            args: the parsed flags, `None` if not given.
            needs: name -> (whether the flag has an effect, what it needs for that).
        """
        for name, (met, need) in needs.items():
            if getattr(args, name) is not None and not met:
                self.error(f"{flag(name)} needs {need}: leave it out")


def flag(name: str) -> str:
    """A setting's name as a command-line flag."""
    return "--" + name.replace("_", "-")


def filled(args: argparse.Namespace, published: Any) -> argparse.Namespace:
    """The flags, with published settings for those that were not given.

    Settings that are `None` stay `None` even if the flag was given, because the method
    has no such setting.
    """
    made = argparse.Namespace(**vars(args))
    for name, value in dataclasses.asdict(published).items():
        if value is None or getattr(args, name) is None:
            setattr(made, name, value)
    return made


def settings(args: argparse.Namespace, *hidden: str) -> dict[str, Any]:
    """The flags that determine a run's results, by name."""
    hidden = ("out", "resume", "download", *hidden)
    return {k: v for k, v in sorted(vars(args).items()) if k not in hidden}


@contextlib.contextmanager
def one_line_nonfinite() -> Iterator[None]:
    """Turns NaN or infinity in training into one line and exit status 1."""
    try:
        yield
    except tb.NonFiniteError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def at_least(kind: type, least: float) -> Callable[[str], Any]:
    """An argparse type for finite numbers of at least `least`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = f"{kind.__name__} of at least {least}"
    return parse


def share(text: str) -> float:
    """An argparse type for numbers above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def fraction(text: str) -> float:
    """An argparse type for numbers in [0, 1), such as a momentum."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def finite(text: str) -> float:
    """An argparse type for finite numbers."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value
