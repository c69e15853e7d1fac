"""Shared by all experiment scripts: flags, files, resuming.

A run writes into one folder: `config.json` (every setting, versions, seed),
`metrics.csv` (one row per evaluation, with `seconds`), `summary.json` and pictures.
JSON files and backups are written atomically.

Scripts are run as files, `python experiments/NAME.py`, and import this package first:
it silences TensorFlow's messages and makes `data_prep` importable.
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

# ruff: noqa: E402
from common.callbacks import Evaluate as Evaluate
from common.callbacks import EvaluateEpochs as EvaluateEpochs
from common.callbacks import train as train
from common.flags import JIT as JIT
from common.flags import Parser as Parser
from common.flags import at_least as at_least
from common.flags import filled as filled
from common.flags import finite as finite
from common.flags import flag as flag
from common.flags import fraction as fraction
from common.flags import one_line_nonfinite as one_line_nonfinite
from common.flags import settings as settings
from common.flags import share as share
from common.inversion_free import InversionFree as InversionFree
from common.optimizers import adam as adam
from common.pictures import Panel as Panel
from common.pictures import draw_images as draw_images
from common.pictures import draw_line as draw_line
from common.pictures import draw_matrix as draw_matrix
from common.pictures import figure as figure
from common.pictures import plot_columns as plot_columns
from common.progress import FitProgress as FitProgress
from common.progress import Progress as Progress
from common.run import Run as Run
from common.run import begin as begin
from common.run import best_row as best_row
from common.run import numbers as numbers
from common.run import rows_of as rows_of
from common.run import write_json as write_json
from common.training import trainer as trainer
from common.trials import concluded as concluded
from common.trials import in_folder as in_folder
from common.trials import many_runs as many_runs
from common.trials import sweep as sweep
from common.trials import trials as trials
from data_prep.command_line import one_line_errors as one_line_errors
from data_prep.command_line import positive as positive
