"""Random operations whose samples depend only on a seed, however they are called."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.random import seed_generator
from tensorflow.python.framework import random_seed
from tensorflow.python.ops import (
    control_flow_v2_func_graphs,
    gen_candidate_sampling_ops,
    gen_image_ops,
    gen_nn_ops,
    gen_random_ops,
    gen_stateful_random_ops,
)
from tensorflow.python.ops import gen_stateless_random_ops as stateless
from tensorflow.python.ops.parallel_for import control_flow_ops as parallel_for

from tfbilevel._workarounds import functions_inline
from tfbilevel._workarounds.swap import Replacement, Swap

# Odd numbers without a pattern, so that sums of small multiples of them rarely
# coincide modulo 2^32. The random operations themselves scramble the sums.
CALL, OWN, COUNT = 0x9E3779B1, 0x85EBCA77, 0x27D4EB2F
PASS, NEST = 0x165667B1, 0x2545F491

LOOPS = (
    control_flow_v2_func_graphs.WhileBodyFuncGraph,
    control_flow_v2_func_graphs.WhileCondFuncGraph,
)
CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
CALLS |= {a + b for a in ("", "Stateless") for b in ("If", "Case", "While")}
FRACTIONAL = ("FractionalMaxPool", "FractionalAvgPool")


def wrapped(number: int) -> int:
    """The number modulo 2^32, as an int32."""
    return (number + 2**31) % 2**32 - 2**31


class _Evaluation:
    """One evaluation of a function: its seed and the number of samples so far."""

    def __init__(self, seed: Any):
        self.seed, self.samples = seed, 0
        self.graph = (
            None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        )
        self.mapped: list[Any] = []  # current entries of enclosing tf.vectorized_maps

    def next(self, own: Any = None) -> tf.Tensor:
        """The seed of the next sample, int32, [2].

        Args:
            own: the operation's own seed, used in place of the base.
        """
        self.samples += 1
        number, base = tf.unstack(tf.convert_to_tensor(self.seed, tf.int32))
        base = base if own is None else tf.cast(own, tf.int32) * wrapped(OWN)
        # TensorFlow traces a loop's body once: each iteration gets its own seed.
        factor = 1
        for passed in [*self._loops(), *self.mapped]:
            number += tf.cast(passed, tf.int32) * wrapped(PASS * factor)
            factor *= NEST
        return tf.stack([number, base + wrapped(CALL * self.samples)])

    def _loops(self) -> list[tf.Tensor]:
        """The counters of the loops around the current graph."""
        counters: list[tf.Tensor] = []
        if tf.executing_eagerly():
            return counters
        graph: Any = tf.compat.v1.get_default_graph()
        while graph is not None and graph is not self.graph:
            if isinstance(graph, LOOPS):
                counters.append(graph.inputs[0])
            graph = getattr(graph, "outer_graph", None)
        return counters


class _ThreadState(threading.local):
    """The evaluations that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.evaluations: list[_Evaluation] = []


_here = _ThreadState()


@contextlib.contextmanager
def fixed_randomness(seed: Any) -> Iterator[None]:
    """Makes the same seed give the same samples in everything evaluated in the context.

    In this thread, `tf.random`, `tf.nn.dropout`, `tf.image.random_*`, `keras.random`,
    Keras's random layers and `tf.random.Generator` sample by the seed and by the
    number of samples taken before. No state is written, except that of seed generators
    in a `keras.StatelessScope`. The seed of a generator or an operation itself is
    also taken into account.

    Args:
        seed: int32, [2].

    Raises:
        ValueError: for an operation that no seed can fix.
    """
    evaluation = _Evaluation(seed)
    before = _last_operation(evaluation.graph)
    with _replaced.in_use(), functions_inline():
        _here.evaluations.append(evaluation)
        try:
            yield
        finally:
            _here.evaluations.pop()
    if evaluation.graph is not None:
        _require_fixed(evaluation.graph, before)


def current_seed() -> Any:
    """The seed of the current evaluation; `None` if there is none."""
    return _here.evaluations[-1].seed if _here.evaluations else None


# Stateful operations that have a stateless counterpart.


def _normal(seed: Any, shape: Any, dtype: Any) -> tf.Tensor:
    return stateless.stateless_random_normal(shape, seed, dtype)


def _uniform(seed: Any, shape: Any, dtype: Any) -> tf.Tensor:
    return stateless.stateless_random_uniform(shape, seed, dtype)


def _uniform_int(seed: Any, shape: Any, minval: Any, maxval: Any) -> tf.Tensor:
    return stateless.stateless_random_uniform_int(shape, seed, minval, maxval)


def _truncated_normal(seed: Any, shape: Any, dtype: Any) -> tf.Tensor:
    return stateless.stateless_truncated_normal(shape, seed, dtype)


def _gamma(seed: Any, shape: Any, alpha: Any) -> tf.Tensor:
    shape = _followed_by(shape, alpha)
    return stateless.stateless_random_gamma_v2(shape, seed, alpha)


def _poisson(seed: Any, shape: Any, rate: Any, dtype: Any = tf.int64) -> tf.Tensor:
    shape = _followed_by(shape, rate)
    return stateless.stateless_random_poisson(shape, seed, rate, dtype)


def _followed_by(shape: Any, parameter: Any) -> tf.Tensor:
    """The shape of the samples: `shape` for every entry of the parameter."""
    shape = tf.convert_to_tensor(shape)
    return tf.concat([shape, tf.shape(parameter, out_type=shape.dtype)], axis=0)


def _categorical(
    seed: Any, logits: Any, num_samples: Any, output_dtype: Any = tf.int64
) -> tf.Tensor:
    return stateless.stateless_multinomial(logits, num_samples, seed, output_dtype)


def _shuffle(seed: Any, value: Any) -> tf.Tensor:
    # A gather has derivatives, and XLA and pfor support it.
    value = tf.convert_to_tensor(value)
    count = tf.shape(value)[:1]
    keys = stateless.stateless_random_uniform_full_int(count, seed, tf.int32)
    shuffled = tf.gather(value, tf.argsort(keys))
    shuffled.set_shape(value.shape)
    return shuffled


def _bounding_box(
    seed: Any, image_size: Any, bounding_boxes: Any, min_object_covered: Any, **options
) -> Any:
    return gen_image_ops.stateless_sample_distorted_bounding_box(
        image_size, bounding_boxes, min_object_covered, seed, **options
    )


def _fixed(original: Callable, twin: Callable) -> Callable:
    def sample(
        *arguments: Any,
        seed: int = 0,
        seed2: int = 0,
        name: Any = None,
        **keywords: Any,
    ) -> Any:
        if not _here.evaluations:
            return original(*arguments, seed=seed, seed2=seed2, name=name, **keywords)
        own = wrapped(seed2) if (seed, seed2) != (0, 0) else None
        with tf.name_scope(name or original.__name__):
            return twin(_here.evaluations[-1].next(own), *arguments, **keywords)

    return sample


_get_seed = random_seed.get_seed


def _own_seed(op_seed: Any) -> tuple:
    """An operation's own seed only: reading the global one would advance it."""
    if not _here.evaluations:
        return _get_seed(op_seed)
    return (0, 0) if op_seed is None else (random_seed.DEFAULT_GRAPH_SEED, op_seed)


# Keras.

_next = keras.random.SeedGenerator.next
_global = seed_generator.global_seed_generator
_default_seed = seed_generator.make_default_seed


def _next_fixed(self: Any, ordered: bool = True) -> tf.Tensor:
    if not _here.evaluations:
        return _next(self, ordered)
    with contextlib.ExitStack() as stack:
        if not keras.src.backend.common.stateless_scope.in_stateless_scope():
            stack.enter_context(keras.StatelessScope())
        state = _next(self, ordered)
    own, count = tf.unstack(tf.cast(state, tf.int32))
    return _here.evaluations[-1].next(own + count * wrapped(COUNT))


class _SeedsOfTheEvaluation:
    """Replaces Keras's global seed generator."""

    def next(self, ordered: bool = True) -> tf.Tensor:
        del ordered
        return _here.evaluations[-1].next()


def _global_fixed() -> Any:
    return _SeedsOfTheEvaluation() if _here.evaluations else _global()


def _default_seed_fixed() -> int:
    """A seed for layers created in the function, the same at every evaluation."""
    if not _here.evaluations:
        return _default_seed()
    evaluation = _here.evaluations[-1]
    evaluation.samples += 1
    return CALL * evaluation.samples % 10**9


# `tf.random.Generator`.

_prepare_key_counter = tf.random.Generator._prepare_key_counter


def _key_counter_fixed(self: Any, shape: Any) -> tuple:
    if not _here.evaluations:
        return _prepare_key_counter(self, shape)
    if self.algorithm != tf.random.Algorithm.PHILOX.value:
        raise _not_fixed("tf.random.Generator", f"algorithm {self.algorithm}")
    seed = _here.evaluations[-1].next()
    return tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)


# `tf.vectorized_map` and similar functions trace once for all entries.

_pfor = parallel_for.pfor


def _pfor_numbered(loop_fn: Callable, *arguments: Any, **keywords: Any) -> Any:
    configured = parallel_for._loop_fn_has_config(loop_fn)
    if not _here.evaluations or configured:
        return _pfor(loop_fn, *arguments, **keywords)

    def numbered(entry: Any) -> Any:
        # Called eagerly, this runs in a separate graph, but in the same evaluation.
        mapped = _here.evaluations[-1].mapped
        mapped.append(entry)
        try:
            return loop_fn(entry)
        finally:
            mapped.pop()

    return _pfor(numbered, *arguments, **keywords)


# Operations that cannot be fixed.


def _not_fixed(operation: str, name: str) -> ValueError:
    return ValueError(
        "A loss must be one fixed function within an outer step, at every inner step "
        "and in the reverse sweep. It samples by an operation whose numbers no seed "
        "can fix. Use keras.random or tf.random.stateless_* instead. "
        f"Received: {operation} ({name})"
    )


def _refused(original: Callable, operation: str) -> Callable:
    def sample(*arguments: Any, **keywords: Any) -> Any:
        fixed = operation in FRACTIONAL and keywords.get("deterministic")
        if _here.evaluations and not fixed:
            raise _not_fixed(operation, keywords.get("name") or original.__name__)
        return original(*arguments, **keywords)

    return sample


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


TWINS = [
    (gen_random_ops, "random_standard_normal", _normal),
    (gen_random_ops, "random_uniform", _uniform),
    (gen_random_ops, "random_uniform_int", _uniform_int),
    (gen_random_ops, "truncated_normal", _truncated_normal),
    (gen_random_ops, "random_gamma", _gamma),
    (gen_random_ops, "random_poisson_v2", _poisson),
    (gen_random_ops, "multinomial", _categorical),
    (gen_random_ops, "random_shuffle", _shuffle),
    (gen_image_ops, "sample_distorted_bounding_box_v2", _bounding_box),
]
REFUSED = [
    (gen_random_ops, "parameterized_truncated_normal"),
    (gen_random_ops, "random_poisson"),
    (gen_image_ops, "sample_distorted_bounding_box"),
    (gen_nn_ops, "fractional_avg_pool"),
    (gen_nn_ops, "fractional_max_pool"),
    (gen_candidate_sampling_ops, "fixed_unigram_candidate_sampler"),
    (gen_candidate_sampling_ops, "learned_unigram_candidate_sampler"),
    (gen_candidate_sampling_ops, "log_uniform_candidate_sampler"),
    (gen_candidate_sampling_ops, "thread_unsafe_unigram_candidate_sampler"),
    (gen_candidate_sampling_ops, "uniform_candidate_sampler"),
    (gen_stateful_random_ops, "non_deterministic_ints"),
    (gen_stateful_random_ops, "rng_read_and_skip"),
    (gen_stateful_random_ops, "rng_skip"),
    (gen_stateful_random_ops, "stateful_random_binomial"),
    (gen_stateful_random_ops, "stateful_standard_normal"),
    (gen_stateful_random_ops, "stateful_standard_normal_v2"),
    (gen_stateful_random_ops, "stateful_truncated_normal"),
    (gen_stateful_random_ops, "stateful_uniform"),
    (gen_stateful_random_ops, "stateful_uniform_full_int"),
    (gen_stateful_random_ops, "stateful_uniform_int"),
]
# Their names in graphs, where they come from tf.raw_ops or from earlier traces.
STATEFUL = {_camel(name) for _, name, *_ in [*TWINS, *REFUSED]} - set(FRACTIONAL)

_replaced = Swap(
    [
        *(
            Replacement(module, name, _fixed(getattr(module, name), twin))
            for module, name, twin in TWINS
        ),
        *(
            Replacement(module, name, _refused(getattr(module, name), _camel(name)))
            for module, name in REFUSED
        ),
        Replacement(random_seed, "get_seed", _own_seed),
        Replacement(keras.random.SeedGenerator, "next", _next_fixed),
        Replacement(seed_generator, "global_seed_generator", _global_fixed),
        Replacement(seed_generator, "make_default_seed", _default_seed_fixed),
        Replacement(tf.random.Generator, "_prepare_key_counter", _key_counter_fixed),
        Replacement(parallel_for, "pfor", _pfor_numbered),
    ]
)


def _last_operation(graph: Any) -> int:
    return 0 if graph is None else len(graph.get_operations())


def _require_fixed(graph: Any, before: int) -> None:
    """Raise if a stateful random operation was added to the graph since `before`."""
    for operation in graph.get_operations()[before:]:
        if operation.type in STATEFUL:
            raise _not_fixed(operation.type, operation.name)
        if operation.type in CALLS:
            _require_fixed_calls(graph, operation.node_def, set())


def _require_fixed_calls(graph: Any, node: Any, seen: set[str]) -> None:
    """The same for the functions called by a node."""
    for value in node.attr.values():
        for name in [value.func.name, *(f.name for f in value.list.func)]:
            if not name or name in seen or not graph._is_function(name):
                continue
            seen.add(name)
            for inner in graph._get_function(name).cached_definition.node_def:
                if inner.op in STATEFUL:
                    raise _not_fixed(inner.op, inner.name)
                _require_fixed_calls(graph, inner, seen)
