"""PyTorch in the order of the published scripts.

Variants: published, higher (the unroll by automatic differentiation).

The published unroll calls `reverse` of the hypertorch repository, whose import name
is hypergrad and which is not on the package index (PyPI's `hypergrad` is another
project, without a reverse mode). `reverse` below restates its algorithm.

One published error is not repeated, because the numbers would not be those of the
others: the forward pass there uses one example's weight for all examples.
"""

import argparse
import copy
from collections.abc import Callable

import higher
import numpy as np
import protocol
import torch
import torch.nn.functional as F


class PublishedTorch:
    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        torch.set_num_threads(arguments.threads)
        self.train = torch.from_numpy(instance.train)
        self.train_labels = torch.from_numpy(instance.train_labels).long()
        self.validation = torch.from_numpy(instance.validation)
        self.validation_labels = torch.from_numpy(instance.validation_labels).long()
        self.inner_steps = instance.inner_steps
        self.x = torch.from_numpy(instance.upper.copy()).requires_grad_(True)
        self.x_optimizer = torch.optim.SGD([self.x], lr=protocol.UPPER_RATE)
        self.net = _network(instance.lower)
        self.y_optimizer = torch.optim.SGD(
            self.net.parameters(), lr=protocol.LOWER_RATE
        )
        self.inner_net = _network(instance.auxiliary)
        self.inner_optimizer = torch.optim.SGD(
            self.inner_net.parameters(), lr=protocol.INNER_RATE
        )
        self.weight = protocol.WEIGHT.get(arguments.method, 0.0)
        self.step = {
            ("v-pbgd", "published"): self.value_gap,
            ("g-pbgd", "published"): self.gradient_norm,
            ("rhg", "published"): self.reverse,
            ("rhg", "higher"): self.unroll_with_higher,
        }[arguments.method, arguments.variant]

    def hypergradient(self) -> np.ndarray:
        self.step()
        return self.x.grad.numpy().copy()

    def run(self, steps: int, clock: protocol.Clock) -> int:
        del clock
        for _ in range(steps):
            self.step()
        return steps

    def value_gap(self) -> None:
        with torch.no_grad():
            weights = torch.sigmoid(self.x)
        self.inner_optimizer.zero_grad()
        losses = self._train_losses(self.inner_net)
        (weights * losses).mean().backward()
        self.inner_optimizer.step()

        self.y_optimizer.zero_grad()
        self.x_optimizer.zero_grad()
        validation = self.net(self.validation)
        train = self.net(self.train)
        upper = F.cross_entropy(validation, self.validation_labels)
        losses = F.cross_entropy(train, self.train_labels, reduction="none")
        lower = (torch.sigmoid(self.x) * losses).mean()
        constant = self._train_losses(self.inner_net).detach()
        value = (torch.sigmoid(self.x) * constant).mean()
        scale = protocol.scale(self.weight)
        (scale * (upper + self.weight * (lower - value))).backward()
        self.x_optimizer.step()
        self.y_optimizer.step()

    def gradient_norm(self) -> None:
        self.y_optimizer.zero_grad()
        self.x_optimizer.zero_grad()
        validation = self.net(self.validation)
        train = self.net(self.train)
        upper = F.cross_entropy(validation, self.validation_labels)
        losses = F.cross_entropy(train, self.train_labels, reduction="none")
        lower = (torch.sigmoid(self.x) * losses).mean()
        gradient = torch.autograd.grad(
            lower, list(self.net.parameters()), create_graph=True
        )
        norm = sum(torch.linalg.norm(leaf) ** 2 for leaf in gradient)
        scale = protocol.scale(self.weight)
        (scale * (upper + self.weight / 2 * norm)).backward()
        self.x_optimizer.step()
        self.y_optimizer.step()

    def reverse(self) -> None:
        iterates = [[p.detach().requires_grad_(True) for p in self.net.parameters()]]
        for _ in range(self.inner_steps):
            iterates.append(self._inner_map(iterates[-1], [self.x]))
        self.x_optimizer.zero_grad()
        (self.x.grad,) = reverse(
            iterates, [self.x], self._inner_map, self._validation_loss
        )
        self.x_optimizer.step()

    def unroll_with_higher(self) -> None:
        self.x_optimizer.zero_grad()
        net = copy.deepcopy(self.net)
        optimizer = torch.optim.SGD(net.parameters(), lr=protocol.UNROLL_RATE)
        with higher.innerloop_ctx(net, optimizer) as (functional, differentiable):
            for _ in range(self.inner_steps):
                losses = self._train_losses(functional)
                differentiable.step((torch.sigmoid(self.x) * losses).mean())
            upper = F.cross_entropy(functional(self.validation), self.validation_labels)
            (self.x.grad,) = torch.autograd.grad(upper, [self.x])
        self.x_optimizer.step()

    def _train_losses(self, net: Callable) -> torch.Tensor:
        return F.cross_entropy(net(self.train), self.train_labels, reduction="none")

    def _inner_map(self, parameters: list, hyperparameters: list) -> list:
        losses = F.cross_entropy(
            _logits(parameters, self.train), self.train_labels, reduction="none"
        )
        loss = (torch.sigmoid(hyperparameters[0]) * losses).mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return [
            p - protocol.UNROLL_RATE * g
            for p, g in zip(parameters, gradients, strict=True)
        ]

    def _validation_loss(self, parameters: list, hyperparameters: list) -> torch.Tensor:
        del hyperparameters
        return F.cross_entropy(
            _logits(parameters, self.validation), self.validation_labels
        )


def reverse(
    iterates: list, hyperparameters: list, step: Callable, outer_loss: Callable
) -> list:
    """Reverse mode over stored iterates, each step evaluated anew.

    As in the package: the iterates are detached here (and keep the graph they came
    with until then), and each step's map is pulled back twice, once to the
    hyperparameters and once to the parameters.
    """
    iterates = [[w.detach().requires_grad_(True) for w in point] for point in iterates]
    loss = outer_loss(iterates[-1], hyperparameters)
    adjoint = torch.autograd.grad(loss, iterates[-1], retain_graph=True)
    total = _gradient_or_zeros(loss, hyperparameters)
    for point in reversed(iterates[:-1]):
        mapped = step(point, hyperparameters)
        part = torch.autograd.grad(
            mapped,
            hyperparameters,
            grad_outputs=adjoint,
            retain_graph=True,
            allow_unused=True,
        )
        total = [t + p for t, p in zip(total, part, strict=True)]
        adjoint = torch.autograd.grad(mapped, point, grad_outputs=adjoint)
    return total


def _gradient_or_zeros(loss: torch.Tensor, inputs: list) -> list:
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [
        torch.zeros_like(i) if g is None else g
        for g, i in zip(gradients, inputs, strict=True)
    ]


def _logits(parameters: list, images: torch.Tensor) -> torch.Tensor:
    hidden = images
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        hidden = torch.sigmoid(F.linear(hidden, weight, bias))
    return F.linear(hidden, parameters[-2], parameters[-1])


def _network(leaves: list) -> torch.nn.Module:
    layers = []
    for kernel, bias in zip(leaves[::2], leaves[1::2], strict=True):
        layer = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(kernel.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
        layers += [layer, torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])


if __name__ == "__main__":
    protocol.serve(PublishedTorch)
