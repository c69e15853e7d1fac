"""Creates `.venv-bench`, the environment of the benchmarks' peers.

    python3 benchmarks/environment.py

The peers are installed apart from the library, because they need other versions of
array packages. Running this again installs only what is missing. With `--gpu`, for
`gpu.py`, PyTorch and JAX come with their CUDA libraries (several GB).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-bench"
PYTHON = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"

# Pinned to a CPU wheel of PyTorch; newer versions may install GPU packages.
TORCH = "torch==2.13.0"
PEERS = ("higher==0.2.1", "jax", "cleanlab>=2", "scikit-learn", "numpy")
# Installed without dependencies: its unused torchvision would replace PyTorch.
HYPERGRAD = "hypergrad==0.0.1"
# Untried: nobody had a GPU here.
GPU_TORCH, GPU_PEERS = "torch", ("jax[cuda12]",)
IMPORTED = ("torch", "higher", "jax", "cleanlab", "sklearn", "hypergrad")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="with CUDA libraries")
    gpu = parser.parse_args(argv).gpu
    torch, more = (GPU_TORCH, GPU_PEERS) if gpu else (TORCH, ())
    if not PYTHON.exists():
        print(f"creating {ENVIRONMENT}", flush=True)
        venv.EnvBuilder(with_pip=True).create(ENVIRONMENT)
    # PyTorch is installed first, so that no peer can request another build of it.
    for requirements in (
        (torch,),
        (torch, *PEERS, *more),
        ("--no-deps", HYPERGRAD),
    ):
        print("installing", " ".join(requirements), flush=True)
        command = [PYTHON, "-m", "pip", "install", "--quiet", *requirements]
        if subprocess.run(command).returncode != 0:
            print(
                f"error: pip could not install {' '.join(requirements)}; see its "
                "message above. Check the package index, then run this again.",
                file=sys.stderr,
            )
            return 1
    print(json.dumps(versions(), indent=2))
    print(f"ready: {PYTHON}")
    return 0


def versions() -> dict[str, str]:
    """Name -> version of every peer, as imported in the environment."""
    code = (
        "import importlib, importlib.metadata as m, json, sys\n"
        f"names = {IMPORTED!r}\n"
        "[importlib.import_module(name) for name in names]\n"
        "shown = {'sklearn': 'scikit-learn'}\n"
        "found = {n: m.version(shown.get(n, n)) for n in names}\n"
        "print(json.dumps({'python': sys.version.split()[0], **found}))\n"
    )
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: a peer cannot be imported:\n{done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
