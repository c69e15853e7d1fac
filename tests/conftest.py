"""What every test needs before TensorFlow is imported."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow never frees what XLA compiled, and each program costs about a hundred memory
# mappings, half as many when it is compiled in one part. Linux grants a process 65,530:
# past them, the next compilation is a segmentation fault.
_ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{_ONE_PART} {os.environ.get('XLA_FLAGS', '')}".strip()

import keras  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)
