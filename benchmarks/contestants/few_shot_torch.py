"""Few-shot tasks in PyTorch. Variants:

func    torch.func, as in its MAML tutorial: grad of a vmap over tasks whose inner
        steps are grads themselves
higher  higher.innerloop_ctx, one task after the other, as in its MAML example
exact   as `higher`, in float64: the gradient that the others are compared with

torch.func's second derivative through batch_norm is wrong (torch 2.13.0): central
differences in float64 agree with `higher` and with the library, and torch.func computes
a nonzero gradient for a bias before a normalisation, which must be zero.
"""

import argparse

import few_shot_protocol
import numpy as np
import protocol
import torch
import torch.nn.functional as F


def network(weights: list, images: torch.Tensor) -> torch.Tensor:
    return head(weights[-2:], features(weights[:-2], images))


def features(weights: list, images: torch.Tensor) -> torch.Tensor:
    for block in range(4):
        kernel, bias, scale, shift = weights[4 * block : 4 * block + 4]
        images = F.conv2d(images, kernel, bias, padding=1)
        images = F.batch_norm(
            images, None, None, scale, shift, True, eps=few_shot_protocol.EPSILON
        )
        images = F.max_pool2d(F.relu(images), 2)
    return images.flatten(1)


def head(weights: list, inputs: torch.Tensor) -> torch.Tensor:
    kernel, bias = weights
    return inputs @ kernel + bias


def adapted(logits, weights: list, inputs: torch.Tensor, labels, steps: int) -> list:
    """Inner steps as functions of the weights (torch.func)."""

    def loss(weights: list) -> torch.Tensor:
        return F.cross_entropy(logits(weights, inputs), labels)

    for _ in range(steps):
        gradients = torch.func.grad(loss)(weights)
        pairs = zip(weights, gradients, strict=True)
        weights = [w - few_shot_protocol.INNER_RATE * g for w, g in pairs]
    return weights


class Parameters(torch.nn.Module):
    """A network whose weights are a list, for `higher` to patch."""

    def __init__(self, weights: list, logits):
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)
        self.logits = logits

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits(list(self.weights), inputs)


class Steps:
    def __init__(
        self, arguments: argparse.Namespace, instance: few_shot_protocol.Instance
    ):
        torch.set_num_threads(arguments.threads)
        dtype = torch.float64 if arguments.variant == "exact" else torch.float32
        self.variant, self.method = arguments.variant, arguments.method
        self.steps = instance.steps

        def images(array: np.ndarray) -> torch.Tensor:
            moved = np.ascontiguousarray(np.moveaxis(array, -1, 2))
            return torch.tensor(moved, dtype=dtype)

        self.data = (
            images(instance.support),
            torch.tensor(instance.support_labels.astype("int64")),
            images(instance.query),
            torch.tensor(instance.query_labels.astype("int64")),
        )
        self.now = [
            torch.tensor(torch_layout(leaf), dtype=dtype) for leaf in instance.weights
        ]

    def gradient(self) -> list:
        if self.variant in ("higher", "exact"):
            return self.higher_gradient()
        return torch.func.grad(self.mean_loss)(self.now)

    def mean_loss(self, weights: list) -> torch.Tensor:
        def task(support, labels, query, answers):
            if self.method == "maml":
                own = adapted(network, weights, support, labels, self.steps)
                return F.cross_entropy(network(own, query), answers)
            body = weights[:-2]
            inputs = features(body, support)
            own = adapted(head, weights[-2:], inputs, labels, self.steps)
            return F.cross_entropy(head(own, features(body, query)), answers)

        return torch.func.vmap(task)(*self.data).mean()

    def higher_gradient(self) -> list:
        import higher

        weights = [leaf.detach().requires_grad_() for leaf in self.now]
        maml = self.method == "maml"
        own = weights if maml else weights[-2:]
        module = Parameters(own, network if maml else head)
        parameters = list(module.parameters())
        body = weights[:-2]
        optimizer = torch.optim.SGD(parameters, few_shot_protocol.INNER_RATE)
        tasks = len(self.data[0])
        totals = [torch.zeros_like(leaf) for leaf in weights]
        wanted = parameters if maml else [*body, *parameters]
        for support, labels, query, answers in zip(*self.data, strict=True):
            if not maml:
                support, query = features(body, support), features(body, query)
            with higher.innerloop_ctx(
                module, optimizer, copy_initial_weights=False
            ) as (patched, inner):
                for _ in range(self.steps):
                    inner.step(F.cross_entropy(patched(support), labels))
                loss = F.cross_entropy(patched(query), answers) / tasks
                for total, part in zip(
                    totals, torch.autograd.grad(loss, wanted), strict=True
                ):
                    total += part
        return totals

    def hypergradient(self) -> np.ndarray:
        return few_shot_protocol.flat([numpy_layout(g) for g in self.gradient()])

    def run(self, steps: int, clock: protocol.Clock) -> int:
        del clock
        for _ in range(steps):
            pairs = zip(self.now, self.gradient(), strict=True)
            rate = few_shot_protocol.UPPER_RATE
            self.now = [(w - rate * g).detach() for w, g in pairs]
        return steps


def torch_layout(leaf: np.ndarray) -> np.ndarray:
    """Kernels as [out, in, height, width]."""
    return leaf.transpose(3, 2, 0, 1).copy() if leaf.ndim == 4 else leaf


def numpy_layout(leaf: torch.Tensor) -> np.ndarray:
    array = leaf.detach().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


if __name__ == "__main__":
    protocol.serve(Steps, few_shot_protocol.load, few_shot_protocol.METHODS)
