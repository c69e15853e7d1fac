"""The matrix products that each method needs at least, and how long they take.

A pass is one product with all the images that a loss reads, for the forward pass, a
weight gradient or a directional derivative. Hidden layers add `small` products between
hidden and output units.
"""

import protocol

HIDDEN, CLASSES, INPUTS = 300, 10, 784

# Each: (passes over the images, small products).
LOSS = (1, 1)
GRADIENT = (2, 3)
POINT = (1, 2)  # shared by second-order products at one point: layers and errors
HESSIAN = (2, 6)  # g_yy v at such a point; its first half gives g_xy v
MIXED = (1, 2)  # only g_xy v

SOLVER_STEPS, FACTORS = protocol.SOLVER_STEPS, protocol.FACTORS

# Each: (times, products).
PER_STEP = {
    # z: step and loss; y: gradients on validation and training data.
    "v-pbgd": [(3, GRADIENT), (1, LOSS)],
    # y: gradients on validation and training data; the gradient of the norm.
    "g-pbgd": [(2, GRADIENT), (1, HESSIAN)],
    # A step; the reverse sweep from stored iterates.
    "rhg": [(1, GRADIENT), (1, POINT), (1, HESSIAN)],
    # A step and f_y; one product per solver step. The solution is a sum of directions,
    # so its g_xy v is the sum of theirs.
    "aid-cg": [(2, GRADIENT), (1, POINT), (SOLVER_STEPS, HESSIAN)],
    # Likewise; the first solver step multiplies v = 0.
    "aid-fp": [(2, GRADIENT), (1, POINT), (SOLVER_STEPS - 1, HESSIAN), (1, MIXED)],
    # Steps and f_y, the factors, the mixed product, all on different minibatches.
    "stocbio": [
        (protocol.STOCHASTIC_STEPS + 1, GRADIENT),
        (FACTORS, POINT),
        (FACTORS, HESSIAN),
        (1, LOSS),
        (1, MIXED),
    ],
}


def count(net: str, method: str, rows: int) -> dict[str, float]:
    """Floating-point operations of one step (RHG: of one inner step), bytes read."""
    rows = images_read(method, rows)
    passes = sum(times * products[0] for times, products in PER_STEP[method])
    small = sum(times * products[1] for times, products in PER_STEP[method])
    wide = CLASSES if net == "linear" else HIDDEN
    images = 2.0 * rows * INPUTS * wide
    between = 0.0 if net == "linear" else 2.0 * rows * HIDDEN * CLASSES
    everything = passes * images + small * between
    again = POINT[0] * images + POINT[1] * between if method == "rhg" else 0.0
    return {
        "image_passes": passes,
        "rows": rows,
        "flops": everything,
        "flops_everything_stored": everything - again,
        "bytes": passes * 4.0 * rows * INPUTS,
    }


def images_read(method: str, rows: int) -> int:
    """The number of images that one evaluation of a loss reads."""
    return min(protocol.BATCH_SIZE, rows) if method == "stocbio" else rows


def floor(net: str, method: str, rows: int, rates: dict) -> dict[str, float]:
    counted = count(net, method, rows)
    best = max(rates["flops"].values())
    images = "minibatch" if method == "stocbio" else "images"
    kind = "classes" if net == "linear" else "hidden"
    shaped = max(
        rates["flops"][f"{images} x {kind}"], rates["flops"][f"{images}^T x {kind}"]
    )
    return {
        **counted,
        "seconds_at_best_rate": counted["flops"] / best,
        "seconds_at_rate_of_these_shapes": counted["flops"] / shaped,
        "seconds_everything_stored": counted["flops_everything_stored"] / best,
        "seconds_reading_from_memory": counted["bytes"] / rates["bytes"]["memory"],
        "seconds_reading_from_cache": counted["bytes"] / rates["bytes"]["cache"],
    }
