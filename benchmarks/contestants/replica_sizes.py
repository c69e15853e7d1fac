"""The problems of `scaling.py`: their sizes."""

from typing import NamedTuple

INPUTS, CLASSES = 784, 10


class Sizes(NamedTuple):
    """The problem: data hyper-cleaning, or tasks, on a network 784-hidden-10.

    Attributes:
        batch: images of a batch, of all replicas together.
        weights: example weights, the upper variables.
        hidden: hidden units.
        steps: inner steps, T.
        products: products of a linear solver or series, K.
        tasks: tasks of an outer step, each of `shots` images per level.
    """

    batch: int = 512
    weights: int = 50_000
    hidden: int = 300
    steps: int = 5
    products: int = 5
    tasks: int = 32
    shots: int = 25

    @property
    def lower(self) -> int:
        """The number of lower variables."""
        return (INPUTS + 1) * self.hidden + (self.hidden + 1) * CLASSES

    def upper(self, method: str) -> int:
        """The number of upper variables."""
        return self.lower if method == "maml" else self.weights

    def images(self, method: str) -> int:
        """The number of images of a level in one evaluation of its loss."""
        return self.tasks * self.shots if method == "maml" else self.batch
