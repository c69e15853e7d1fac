"""What a command tells: its progress, and the versions that it ran with."""

import argparse
import platform
import sys

import keras
import numpy as np
import tensorflow as tf

import tfbilevel as tb


def say(options: argparse.Namespace, sentence: str) -> None:
    """On standard error, where progress belongs; nothing with --quiet."""
    if not options.quiet:
        print(sentence, file=sys.stderr)


def versions() -> dict[str, str]:
    """Of everything that decides the numbers."""
    return {
        "tfbilevel": tb.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
