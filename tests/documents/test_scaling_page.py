"""What docs/scaling.md says of Slurm, without a cluster."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
import tensorflow as tf

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "scaling.md"
RULES = re.DOTALL | re.MULTILINE
SLURM = {
    "SLURM_STEP_NODELIST": "n[9-10]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "1",
}


@pytest.fixture
def scontrol(tmp_path: pathlib.Path) -> str:
    """A folder with a stand-in for Slurm's command."""
    command = tmp_path / "scontrol"
    command.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames n[9-10]" ] && printf "n9\\nn10\\n"\n'
    )
    command.chmod(0o755)
    return str(tmp_path)


def test_the_lines_for_slurm_make_a_tf_config(scontrol: str) -> None:
    indented = re.findall(r"^    import json.*?^    }\)$", PAGE.read_text(), RULES)
    (lines,) = map(textwrap.dedent, indented)
    done = subprocess.run(
        [sys.executable, "-c", lines + "\nprint(os.environ['TF_CONFIG'])"],
        env={**os.environ, **SLURM, "PATH": f"{scontrol}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    port = 20000 + 1234567 % 20000
    assert json.loads(done.stdout) == {
        "cluster": {"worker": [f"n9:{port}", f"n10:{port}"]},
        "task": {"type": "worker", "index": 1},
    }


def test_tensorflows_resolver_sorts_machines_by_name(monkeypatch) -> None:
    """When this fails, the page need not warn of it any longer."""
    steps = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    for name, value in {**SLURM, **steps, "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    given = {"port_base": 20000, "gpus_per_node": 2, "gpus_per_task": 2}
    kind = tf.distribute.cluster_resolver.SlurmClusterResolver
    resolver = kind(**given, auto_set_gpu=False)
    addresses = resolver.cluster_spec().as_dict()["worker"]
    assert addresses == ["n10:20000", "n9:20000"]
    assert resolver.task_id == 0  # which Slurm starts on n9
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    kind(**given).cluster_spec()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"  # and not 4,5
