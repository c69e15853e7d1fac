"""What every experiment script needs around its problem: flags, files, resuming.

A run writes into one folder: `config.json` (every setting, versions, seed),
`metrics.csv` (one row per evaluation, with `seconds`), `summary.json` and pictures.
JSON files and backups appear whole or not at all.
"""

from tfbilevel.experiment._callbacks import Backup as Backup
from tfbilevel.experiment._callbacks import Evaluate as Evaluate
from tfbilevel.experiment._callbacks import EvaluateEpochs as EvaluateEpochs
from tfbilevel.experiment._callbacks import train as train
from tfbilevel.experiment._data import cross_entropy as cross_entropy
from tfbilevel.experiment._data import index_batches as index_batches
from tfbilevel.experiment._flags import JIT as JIT
from tfbilevel.experiment._flags import Parser as Parser
from tfbilevel.experiment._flags import at_least as at_least
from tfbilevel.experiment._flags import filled as filled
from tfbilevel.experiment._flags import finite as finite
from tfbilevel.experiment._flags import flag as flag
from tfbilevel.experiment._flags import fraction as fraction
from tfbilevel.experiment._flags import one_line_errors as one_line_errors
from tfbilevel.experiment._flags import (
    one_line_nonfinite as one_line_nonfinite,
)
from tfbilevel.experiment._flags import positive as positive
from tfbilevel.experiment._flags import seed as seed
from tfbilevel.experiment._flags import settings as settings
from tfbilevel.experiment._flags import share as share
from tfbilevel.experiment._inversion_free import InversionFree as InversionFree
from tfbilevel.experiment._optimizers import adam as adam
from tfbilevel.experiment._pictures import draw_images as draw_images
from tfbilevel.experiment._pictures import draw_line as draw_line
from tfbilevel.experiment._progress import FitProgress as FitProgress
from tfbilevel.experiment._progress import Progress as Progress
from tfbilevel.experiment._run import Run as Run
from tfbilevel.experiment._run import write_json as write_json
from tfbilevel.experiment._trials import concluded as concluded
from tfbilevel.experiment._trials import many_runs as many_runs
from tfbilevel.experiment._trials import sweep as sweep
from tfbilevel.experiment._trials import trials as trials
