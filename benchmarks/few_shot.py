"""Meta-iterations per second of MAML and ANIL, compared with torch.func and higher.

    python benchmarks/few_shot.py --out runs/bench-few-shot

A four-block network of 64 filters on 28 x 28 images, 16 tasks, 5-way 1-shot with 15
query images per class, 5 inner steps. The peers run in `.venv-bench` (`make
bench-env`). Contestants run alternately in separate processes, as in hyper_cleaning.py.
`error` is that of the first meta-gradient, compared with float64.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "contestants")]

import environment  # noqa: E402
import few_shot_protocol  # noqa: E402
from hyper_cleaning import Contestant, measure, ratios, started  # noqa: E402

LIBRARY, TORCH = "few_shot_library.py", "few_shot_torch.py"
ENTRANTS = [
    Contestant("tfbilevel", "library", LIBRARY, "plain"),
    Contestant("torch.func", "torch", TORCH, "func", peer=True),
    Contestant("higher", "higher", TORCH, "higher", peer=True),
]
XLA = Contestant("tfbilevel, XLA", "library", LIBRARY, "xla")
EXACT = Contestant("PyTorch, float64", "torch", TORCH, "exact", peer=True)


def forward_operations() -> int:
    """Multiplications and additions of one image through the four convolutions."""
    sides, channels = (28, 14, 7, 3), (1, 64, 64, 64)
    return sum(
        2 * side**2 * 9 * inputs * 64
        for side, inputs in zip(sides, channels, strict=True)
    )


def floor(method: str, instance: few_shot_protocol.Instance) -> float:
    """The least operations of convolutions in one meta-iteration.

    A gradient takes three forward passes, and a second-order product six more. (The
    first layer's input has no gradient, so it is not counted.)
    """
    support, query = (
        instance.support[..., 0, 0, 0].size,
        instance.query[..., 0, 0, 0].size,
    )
    if method == "anil":
        return forward_operations() * 3 * (support + query)
    inner = instance.steps * (3 + 3 + 6) * support
    return forward_operations() * (inner + 3 * query)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=few_shot_protocol.METHODS,
        default=few_shot_protocol.METHODS,
    )
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--queries", type=int, default=15)
    parser.add_argument("--inner-steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--xla", action="store_true", help="XLA too (compiles slowly)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if not environment.PYTHON.exists():
        parser.error("there are no peers: make them with `make bench-env`")
    instance = few_shot_protocol.make(
        args.tasks, args.shots, args.queries, args.inner_steps
    )
    entrants = [*ENTRANTS, XLA] if args.xla else ENTRANTS
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "few-shot.npz"
        few_shot_protocol.save(instance, data)
        for method in args.methods:
            judge = started(EXACT, args, data, method)
            judge.ask(f"hypergradient {folder}/exact.npy")
            judge.close()
            exact = np.load(f"{folder}/exact.npy")
            group = measure(args, data, method, entrants, exact)
            group["gflop"] = floor(method, instance) / 1e9
            found[method] = group
            print(f"{method}: convolutions {group['gflop']:.1f} GFLOP")
            for result in group["results"]:
                print(
                    f"  {result['name']:16s}{1e3 * result['median_seconds']:9.1f} ms"
                    f"{1 / result['median_seconds']:8.2f} per second"
                    f"{result['peak_bytes'] / 2**20:8.0f} MiB peak"
                    f"   error {result['hypergradient_error']:.1e}"
                )
            for family, ratio in ratios(group["results"]).items():
                print(f"  {family} over tfbilevel: {ratio}")
            print(f"  other processes: {100 * group['foreign_share']:.0f} percent")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "few_shot.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
