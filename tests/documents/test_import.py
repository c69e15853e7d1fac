"""`import tfbilevel` brings nothing heavy along."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import tensorflow, keras
before = set(sys.modules)
import tfbilevel
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


@pytest.mark.slow
def test_import_brings_no_other_package_than_tensorflow_s_and_keras_s() -> None:
    """Of scipy, matplotlib, scikit-learn and the like none: in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    # TensorFlow and Keras import parts of themselves late.
    allowed = {"tfbilevel", "tensorflow", "keras"} | set(sys.stdlib_module_names)
    assert set(done.stdout.split()) - allowed == set()
    assert "tfbilevel" in done.stdout
