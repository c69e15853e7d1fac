"""The speed table of hyper_cleaning.py on a GPU, with `fit` by XLA and in bfloat16.

    python benchmarks/environment.py --gpu    # once: PyTorch and JAX with CUDA
    python benchmarks/gpu.py --out runs/gpu

The contestants, the rounds and the tables are those of hyper_cleaning.py; what differs
is where they compute, and that `fit` enters four times. Without a GPU it ends with one
line. A trial of every contestant on a CPU, with few images and rounds, whose times mean
nothing:

    python benchmarks/gpu.py --device cpu --out runs/gpu-trial
"""

import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from hyper_cleaning import (  # noqa: E402
    CONTESTANTS_IN_ORDER,
    checked,
    compare,
    parser,
)
from workers import DEVICES, worker_environment  # noqa: E402

ROWS = 20_000  # images per level: a GPU is idle with 5,000
TRIAL = {"rows": 200, "inner_steps": 3, "rounds": 2, "seconds": 0.02}
FIT = next(one for one in CONTESTANTS_IN_ORDER if one.family == "fit")
FITS = {"fit-xla": "XLA", "fit-bfloat16": "bf16", "fit-xla-bfloat16": "XLA, bf16"}
ENTRANTS = (
    *CONTESTANTS_IN_ORDER,
    # A family of their own, or the column of `fit` would be of the fastest.
    *(
        FIT._replace(name=f"{FIT.name}, {title}", family=variant, variant=variant)
        for variant, title in FITS.items()
    ),
)


def main(argv: list[str] | None = None) -> int:
    own = parser(__doc__.splitlines()[0])
    own.add_argument("--device", choices=DEVICES, default="gpu")
    own.set_defaults(out=pathlib.Path("runs/gpu"), rows=ROWS)
    if own.parse_args(argv).device == "cpu":
        own.set_defaults(**TRIAL)
    arguments = checked(own.parse_args(argv))
    if arguments.device == "gpu" and not gpus():
        print(
            "error: TensorFlow sees no GPU. Install it with CUDA (docs/gpu.md), or try "
            "all contestants on a CPU with --device cpu.",
            file=sys.stderr,
        )
        return 2
    compare(arguments, ENTRANTS, "gpu")
    return 0


def gpus() -> int:
    """The number of GPUs that TensorFlow sees, looked up by another process: this one
    would keep memory of them."""
    code = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=worker_environment(1, "gpu"),
    )
    if done.returncode != 0:
        raise SystemExit(f"error: TensorFlow cannot start:\n{done.stderr[-3000:]}")
    return int(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
