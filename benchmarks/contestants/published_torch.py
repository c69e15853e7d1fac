"""PyTorch, with the operations of the published scripts.

Variants: published, higher (the unroll by automatic differentiation), hypergrad
(implicit gradients by the package of that name on PyPI).
The published unroll calls `reverse` of the hypertorch repository. Its import name is
also hypergrad, but it is not on the package index (PyPI's `hypergrad` is another
project, with implicit gradients and no reverse mode). `reverse`, `implicit`,
`fixed_point` and `conjugate_gradient` below restate its algorithms: conjugate gradients
solve for the fixed point of a gradient step with rate 1, the iteration for that of the
inner step. stocBiO keeps its minibatches in a list, and computes each vector product
from a new forward pass.

Errors of the published code are corrected, because its results would otherwise differ
from the others'. In the published code, the unroll's forward pass uses one example's
weight for all examples; conjugate gradients that reach their tolerance return the
previous iterate; stocBiO's series leaves out its first term and scales only its last,
takes its Hessian from validation data, uses one batch for all factors, and gives images
the weights of other images.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import higher
import numpy as np
import protocol
import torch
import torch.nn.functional as F
from hypergrad import approx_hypergrad


class PublishedTorch:
    def __init__(self, arguments: argparse.Namespace, instance: protocol.Instance):
        torch.set_num_threads(arguments.threads)
        self.gpu = arguments.device == "gpu"
        torch.set_default_device("cuda" if self.gpu else "cpu")
        upper, lower = protocol.make_batches(arguments.method, instance)
        self.validation, self.validation_labels = map(_tensor, upper)
        if arguments.method == "stocbio":
            self.draws = list(zip(*map(_tensor, lower), strict=True))
        else:
            self.train, self.train_labels = map(_tensor, lower)
        self.inner_steps = instance.inner_steps
        self.x = _tensor(instance.upper.copy()).requires_grad_(True)
        self.x_optimizer = torch.optim.SGD([self.x], lr=protocol.UPPER_RATE)
        self.net = _network(instance.lower)
        self.y_optimizer = torch.optim.SGD(
            self.net.parameters(), lr=protocol.LOWER_RATE
        )
        self.inner_net = _network(instance.auxiliary)
        self.inner_optimizer = torch.optim.SGD(
            self.inner_net.parameters(), lr=protocol.AUXILIARY_RATE
        )
        self.y = [p.detach() for p in self.net.parameters()]
        self.weight = protocol.WEIGHT.get(arguments.method, 0.0)
        self.step = {
            ("v-pbgd", "published"): self.value_gap,
            ("g-pbgd", "published"): self.gradient_norm,
            ("rhg", "published"): self.reverse,
            ("rhg", "higher"): self.unroll_with_higher,
            ("aid-cg", "published"): self.implicit_by_conjugate_gradient,
            ("aid-cg", "hypergrad"): self.pypi_conjugate_gradient,
            ("aid-fp", "hypergrad"): self.pypi_neumann,
            ("aid-fp", "published"): self.implicit_by_fixed_point,
            ("stocbio", "published"): self.stochastic,
        }[arguments.method, arguments.variant]

    def hypergradient(self) -> np.ndarray:
        self.step()
        return self.x.grad.cpu().numpy().copy()

    def run(self, steps: int, clock: protocol.Clock) -> int:
        del clock
        for _ in range(steps):
            self.step()
        if self.gpu:
            torch.cuda.synchronize()
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
        optimizer = torch.optim.SGD(net.parameters(), lr=protocol.INNER_RATE)
        with higher.innerloop_ctx(net, optimizer) as (functional, differentiable):
            for _ in range(self.inner_steps):
                losses = self._train_losses(functional)
                differentiable.step((torch.sigmoid(self.x) * losses).mean())
            upper = F.cross_entropy(functional(self.validation), self.validation_labels)
            (self.x.grad,) = torch.autograd.grad(upper, [self.x])
        self.x_optimizer.step()

    def implicit_by_conjugate_gradient(self) -> None:
        step = functools.partial(self._inner_map, rate=1.0)
        self._implicit(step, conjugate_gradient)

    def implicit_by_fixed_point(self) -> None:
        self._implicit(self._inner_map, fixed_point)

    def pypi_conjugate_gradient(self) -> None:
        """As released: every direction is computed from the previous residual."""
        self._implicit_by_hypergrad(
            approx_hypergrad.conjugate_gradient, protocol.SOLVER_STEPS, 1.0
        )

    def pypi_neumann(self) -> None:
        """The series with as many terms as fixed-point steps from zero."""
        self._implicit_by_hypergrad(
            approx_hypergrad.neumann, protocol.SOLVER_STEPS - 1, protocol.INNER_RATE
        )

    def _implicit_by_hypergrad(self, solve: Callable, most: int, rate: float) -> None:
        def inner(y: tuple, x: tuple) -> torch.Tensor:
            return _lower_loss(x[0], list(y), self.train, self.train_labels)

        def outer(y: tuple, x: tuple) -> torch.Tensor:
            return self._validation_loss(list(y), list(x))

        self._inner_step()
        points = tuple(self.y), (self.x.detach(),)
        (self.x.grad,) = solve(inner, outer, *points, most, rate)
        self.x_optimizer.step()

    def _inner_step(self) -> None:
        leaves = _leaves(self.y)
        self.y = _detached(self._inner_map(leaves, [self.x], create_graph=False))

    def _implicit(self, step: Callable, solve: Callable) -> None:
        self._inner_step()
        self.x_optimizer.zero_grad()
        (self.x.grad,) = implicit(
            self.y, [self.x], step, self._validation_loss, solve, protocol.SOLVER_STEPS
        )
        self.x_optimizer.step()

    def stochastic(self) -> None:
        steps, eta = protocol.STOCHASTIC_STEPS, protocol.SERIES_RATE
        y = _leaves(self.y)
        for draw in self.draws[:steps]:
            gradient = self._draw_gradient(y, draw, create_graph=False)
            y = _leaves(_descend(y, protocol.INNER_RATE, gradient))
        self.y = _detached(y)
        term = torch.autograd.grad(self._validation_loss(y, []), y)
        total = list(term)
        for draw in self.draws[steps:-1]:
            moved = _descend(y, eta, self._draw_gradient(y, draw, create_graph=True))
            term = torch.autograd.grad(_dot(moved, term), y)
            total = [t + r for t, r in zip(total, term, strict=True)]
        gradient = self._draw_gradient(y, self.draws[-1], create_graph=True)
        v = [eta * t for t in total]
        self.x_optimizer.zero_grad()
        (mixed,) = torch.autograd.grad(_dot(gradient, v), [self.x])
        self.x.grad = -mixed
        self.x_optimizer.step()

    def _draw_gradient(self, y: list, draw: tuple, create_graph: bool) -> tuple:
        images, labels, indices = draw
        loss = _lower_loss(self.x[indices], y, images, labels)
        return torch.autograd.grad(loss, y, create_graph=create_graph)

    def _train_losses(self, net: Callable) -> torch.Tensor:
        return F.cross_entropy(net(self.train), self.train_labels, reduction="none")

    def _inner_map(
        self,
        parameters: list,
        hyperparameters: list,
        rate: float = protocol.INNER_RATE,
        create_graph: bool = True,
    ) -> list:
        (x,) = hyperparameters
        loss = _lower_loss(x, parameters, self.train, self.train_labels)
        gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph)
        return _descend(parameters, rate, gradients)

    def _validation_loss(self, parameters: list, hyperparameters: list) -> torch.Tensor:
        del hyperparameters
        return F.cross_entropy(
            _logits(parameters, self.validation), self.validation_labels
        )


def reverse(
    iterates: list, hyperparameters: list, step: Callable, outer_loss: Callable
) -> list:
    """Reverse mode over stored iterates; each step is evaluated again.

    As in the package, the iterates are detached only here (until then they keep their
    graph), and each step is differentiated twice, once in the hyperparameters and once
    in the parameters.
    """
    iterates = [_leaves(point) for point in iterates]
    adjoint, total = _outer_gradients(outer_loss, iterates[-1], hyperparameters)
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


def implicit(
    parameters: list,
    hyperparameters: list,
    step: Callable,
    outer_loss: Callable,
    solve: Callable,
    most: int,
    tolerance: float = 0.0,
) -> list:
    """f_x plus v pulled back to x, where v = J'v + f_y at a fixed point of `step`.

    `solve` receives f_y and v -> J'v, the pullback of the step, which runs once.
    """
    parameters = _leaves(parameters)
    rhs, total = _outer_gradients(outer_loss, parameters, hyperparameters)
    mapped = step(parameters, hyperparameters)

    def turned(v: list) -> tuple:
        return torch.autograd.grad(
            mapped, parameters, grad_outputs=v, retain_graph=True
        )

    v = solve(turned, rhs, most, tolerance)
    part = torch.autograd.grad(
        mapped, hyperparameters, grad_outputs=v, allow_unused=True
    )
    return [t if p is None else t + p for t, p in zip(total, part, strict=True)]


def fixed_point(turned: Callable, rhs: tuple, most: int, tolerance: float) -> list:
    """v <- J'v + f_y from zero, until the change of v is below the tolerance."""
    v = [torch.zeros_like(leaf) for leaf in rhs]
    for _ in range(most):
        before, v = v, [t + b for t, b in zip(turned(v), rhs, strict=True)]
        moved = [a - b for a, b in zip(v, before, strict=True)]
        if float(torch.linalg.norm(_flat(moved))) < tolerance:
            break
    return v


def conjugate_gradient(
    turned: Callable, rhs: tuple, most: int, tolerance: float
) -> list:
    """(I - J') v = f_y from zero, until the residual is below the tolerance."""
    v = [torch.zeros_like(leaf) for leaf in rhs]
    residual = direction = list(rhs)
    square = _dot(residual, residual)
    for _ in range(most):
        curved = _descend(direction, 1.0, turned(direction))
        length = square / _dot(direction, curved)
        v = _descend(v, -length, direction)
        residual = _descend(residual, length, curved)
        before, square = square, _dot(residual, residual)
        if float(torch.sqrt(square)) < tolerance:
            break
        direction = _descend(residual, -square / before, direction)
    return v


def _outer_gradients(
    outer_loss: Callable, parameters: list, hyperparameters: list
) -> tuple[tuple, list]:
    """f_y, and f_x or zeros."""
    loss = outer_loss(parameters, hyperparameters)
    to_parameters = torch.autograd.grad(loss, parameters, retain_graph=True)
    gradients = torch.autograd.grad(loss, hyperparameters, allow_unused=True)
    return to_parameters, [
        torch.zeros_like(i) if g is None else g
        for g, i in zip(gradients, hyperparameters, strict=True)
    ]


def _lower_loss(
    x: torch.Tensor, parameters: list, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    losses = F.cross_entropy(_logits(parameters, images), labels, reduction="none")
    return (torch.sigmoid(x) * losses).mean()


def _leaves(variables: list) -> list:
    return [v.detach().requires_grad_(True) for v in variables]


def _detached(variables: list) -> list:
    return [v.detach() for v in variables]


def _descend(variables: list, rate: Any, gradient: Iterable) -> list:
    return [v - rate * g for v, g in zip(variables, gradient, strict=True)]


def _dot(a: Iterable, b: Iterable) -> torch.Tensor:
    return torch.sum(_flat(a) * _flat(b))


def _flat(variables: Iterable) -> torch.Tensor:
    return torch.cat([v.reshape(-1) for v in variables])


def _tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array).to(torch.get_default_device())
    return tensor if tensor.is_floating_point() else tensor.long()


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
            layer.weight.copy_(_tensor(kernel.T.copy()))
            layer.bias.copy_(_tensor(bias))
        layers += [layer, torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])


if __name__ == "__main__":
    protocol.serve(PublishedTorch, device_peak=torch.cuda.max_memory_allocated)
