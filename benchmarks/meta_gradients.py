"""Meta-gradients of MAML, FOMAML and ANIL from PyTorch and `higher`, for the tests.

    .venv-bench/bin/python benchmarks/meta_gradients.py tests/data/meta_gradients.json

Float64, three tasks of 6 x 6 images, a convolution with three filters and a linear
head, two inner steps. The inputs are stored with the gradients.
"""

import json
import pathlib
import sys

import higher
import numpy as np
import torch
import torch.nn.functional as F

TASKS, IMAGES, SIDE, FILTERS, WAYS, STEPS, RATE = 3, 4, 6, 3, 2, 2, 0.3


def inputs() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(11)
    shapes = {
        "kernel": (3, 3, 1, FILTERS),
        "bias": (FILTERS,),
        "head": (FILTERS * (SIDE - 2) ** 2, WAYS),
        "head_bias": (WAYS,),
        "support": (TASKS, IMAGES, SIDE, SIDE, 1),
        "query": (TASKS, IMAGES, SIDE, SIDE, 1),
    }
    return {name: 0.5 * generator.normal(size=shape) for name, shape in shapes.items()}


LABELS = [0, 1, 1, 0]


class Network(torch.nn.Module):
    def __init__(self, arrays: dict[str, np.ndarray]):
        super().__init__()
        kernel = arrays["kernel"].transpose(3, 2, 0, 1).copy()
        self.kernel = torch.nn.Parameter(torch.tensor(kernel))
        self.bias = torch.nn.Parameter(torch.tensor(arrays["bias"]))
        self.head = Head(arrays)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        made = torch.tanh(F.conv2d(images, self.kernel, self.bias))
        # TensorFlow's order of entries has the channels last.
        return made.permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class Head(torch.nn.Module):
    def __init__(self, arrays: dict[str, np.ndarray]):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.tensor(arrays["head"]))
        self.bias = torch.nn.Parameter(torch.tensor(arrays["head_bias"]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.kernel + self.bias


def meta_gradient(method: str, arrays: dict[str, np.ndarray]) -> dict[str, list]:
    network = Network(arrays)
    labels = torch.tensor(LABELS)
    part = network.head if method == "anil" else network
    for support, query in zip(arrays["support"], arrays["query"], strict=True):
        support, query = (
            torch.tensor(np.moveaxis(images, -1, 1).copy())
            for images in (support, query)
        )
        if method == "anil":
            support, query = network.features(support), network.features(query)
        optimizer = torch.optim.SGD(part.parameters(), RATE)
        with higher.innerloop_ctx(
            part,
            optimizer,
            copy_initial_weights=False,
            track_higher_grads=method != "fomaml",
        ) as (patched, inner):
            for _ in range(STEPS):
                inner.step(F.cross_entropy(patched(support), labels))
            loss = F.cross_entropy(patched(query), labels) / TASKS
            if method == "fomaml":
                # First order: the gradient at the adapted weights is used at the start.
                made = torch.autograd.grad(loss, list(patched.parameters()))
                for parameter, gradient in zip(part.parameters(), made, strict=True):
                    before = 0 if parameter.grad is None else parameter.grad
                    parameter.grad = before + gradient
            else:
                loss.backward()
    kernel = network.kernel.grad.numpy().transpose(2, 3, 1, 0)
    rest = [network.bias.grad, network.head.kernel.grad, network.head.bias.grad]
    gradients = [kernel, *(leaf.numpy() for leaf in rest)]
    return [leaf.ravel().tolist() for leaf in gradients]


def main(path: str) -> None:
    found = {m: meta_gradient(m, inputs()) for m in ("maml", "fomaml", "anil")}
    found["inputs"] = {name: array.tolist() for name, array in inputs().items()}
    found["versions"] = {"torch": torch.__version__, "higher": "0.2.1"}
    pathlib.Path(path).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
