"""The command `tfbilevel`."""

import argparse
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from tfbilevel._jobs.command_line.bad_input import BadInput
from tfbilevel._jobs.command_line.clean import clean
from tfbilevel._jobs.command_line.few_shot import few_shot
from tfbilevel._jobs.command_line.tune import tune
from tfbilevel._jobs.optional_packages import MissingPackageError

CLEAN = """
Finds labels that are wrong, with the help of a few examples whose labels are right,
and trains a network on the corrected ones. Writes into the folder --out:

  report.html   what was found, to read in a browser
  issues.csv    the suspicious rows, the most suspicious first; row 0 is the first
  cleaned.csv   the data with corrected labels (cleaned.npz for arrays)
  model.keras   the network; it takes raw rows, texts or pictures
  summary.json  the numbers of the report, the order of the classes, versions

examples:
  tfbilevel clean data.csv --label y --trusted trusted.csv --out report/
  tfbilevel clean reviews.csv --label stars --text review --trusted right.csv --out r/
  tfbilevel clean people.parquet --label job --columns age,city --out people/
  tfbilevel clean pictures/ --trusted checked_pictures/ --out report/
  tfbilevel clean arrays.npz --trusted trusted.npz --out report/
"""
TUNE = """
Learns penalties, label smoothing and strengths of augmentation in one training run, and
compares the tuned network with plain training. Writes into the folder --out:

  report.html          the accuracy and the values found, to read in a browser
  hyperparameters.csv  the values in every epoch
  model.keras          the tuned network; it takes raw rows, texts or pictures
  summary.json         the numbers of the report, the order of the classes, versions

examples:
  tfbilevel tune data.csv --label y --out report/
  tfbilevel tune data.csv --label y --validation other.csv --out report/
  tfbilevel tune pictures/ --search l2,shift,contrast --epochs 40 --out report/
"""
FEW_SHOT = """
Learns from many classes how to learn new ones from a few examples of each. A fifth of
the classes, at least --ways, is kept to measure by. Writes into the folder --out:

  report.html   the accuracy on new classes, to read in a browser
  model.keras   the network, adapted to the classes of --new; load it after
                `import tfbilevel`
  summary.json  the numbers of the report, the order of the classes, versions

examples:
  tfbilevel few-shot characters/ --ways 5 --shots 1 --out report/
  tfbilevel few-shot birds/ --ways 3 --shots 5 --new my_birds/ --out report/
  tfbilevel few-shot arrays.npz --ways 5 --shots 1 --method maml --out report/
"""
DATA = (
    "a .csv, .parquet or .npz file (arrays x and y), or a folder of pictures with one "
    "folder per class"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    0: done. 1: something failed, such as a full disk. 2: wrong input or options.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["tfbilevel", *arguments])
    try:
        with warnings.catch_warnings():
            if options.quiet:
                warnings.simplefilter("ignore")
            options.run(options)
    except (BadInput, MissingPackageError) as error:
        return _failed(options, error, 2)
    except OSError as error:
        return _failed(options, error, 1)
    except KeyboardInterrupt as error:
        return _failed(options, error, 130)
    return 0


def _failed(options: argparse.Namespace, error: BaseException, code: int) -> int:
    if options.traceback:
        traceback.print_exc()
    line = " ".join(str(error).split()) or "interrupted"
    print(f"tfbilevel {options.command}: error: {line}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfbilevel", description="Jobs of bilevel optimization, on your data."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = _command(commands, "clean", "find and correct wrong labels", CLEAN)
    command.add_argument("data", help=DATA)
    command.add_argument(
        "--trusted",
        metavar="DATA",
        help="as data: other examples whose labels are right, some of every class",
    )
    _describe_data(command)
    _describe_training(command)
    command.add_argument("--batch-size", type=_count, metavar="N")
    command.set_defaults(run=clean)
    command = _command(commands, "tune", "learn hyperparameters", TUNE)
    command.add_argument("data", help=DATA)
    command.add_argument(
        "--validation",
        metavar="DATA",
        help="as data: other examples to tune by. Default: a part of the data",
    )
    command.add_argument(
        "--search",
        metavar="A,B",
        help="of l2, label-smoothing, noise, mixup, brightness, contrast, shift. "
        "Default: what suits the kind of data",
    )
    _describe_data(command)
    _describe_training(command)
    command.add_argument("--batch-size", type=_count, metavar="N")
    command.set_defaults(run=tune)
    command = _command(commands, "few-shot", "learn to learn new classes", FEW_SHOT)
    command.add_argument("data", help=f"{DATA}; many classes")
    command.add_argument(
        "--new",
        metavar="DATA",
        help="as data: a few examples of other classes, which model.keras tells apart. "
        "Default: some of those kept to measure by, as an example",
    )
    command.add_argument("--ways", type=_count, default=5, help="classes of a task: 5")
    command.add_argument(
        "--shots", type=_count, default=1, help="examples of each to learn from: 1"
    )
    command.add_argument(
        "--method",
        default="anil",
        choices=("anil", "iaptt", "maml", "fomaml", "imaml"),
        help="default: anil",
    )
    command.add_argument("--steps-per-epoch", type=_count, metavar="N")
    command.add_argument(
        "--episodes",
        type=_count,
        default=600,
        metavar="N",
        help="tasks to measure by: 600",
    )
    _describe_data(command)
    _describe_training(command)
    command.set_defaults(run=few_shot)
    return parser


def _command(commands, name: str, short: str, long: str) -> argparse.ArgumentParser:
    description, _, examples = long.partition("examples:\n")
    return commands.add_parser(
        name,
        help=short,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _describe_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--label", metavar="NAME", help="the column of the labels")
    command.add_argument(
        "--columns",
        metavar="A,B",
        help="columns that the network sees: numbers and strings of few different "
        "values. Default: all such ones but the label",
    )
    command.add_argument("--text", metavar="NAME", help="a column of texts")
    command.add_argument(
        "--image-size",
        type=_count,
        metavar="PIXELS",
        help="height and width of pictures for the network. Default: that of most "
        "pictures, or 64 if one of them is above 96",
    )


def _describe_training(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", required=True, metavar="FOLDER", help="the folder of the results"
    )
    command.add_argument("--epochs", type=_count, metavar="N")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the same names in --out",
    )
    command.add_argument("--quiet", action="store_true", help="print errors only")
    command.add_argument(
        "--traceback", action="store_true", help="print where an error comes from"
    )


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number
