"""Training on another device than the host, as on a GPU: two logical CPU devices."""

import os
import pathlib
import subprocess
import sys

import pytest

# Every method, and every way to compile; "auto" compiles twice: the smallest step.
CASES = (
    "Unroll:on",
    "UnrollHost:off",
    "stores",
    "Implicit:off",
    "ValueGap:off",
    "GradientNorm:auto",
    "AugmentedLagrangian:off",
    "StocBiO:off",
)


@pytest.mark.slow
def test_every_method_is_equal_on_a_second_device():
    here = pathlib.Path(__file__).parents[1]
    path = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, here / "second_device.py", *CASES],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [f"equal {case}" for case in CASES]
