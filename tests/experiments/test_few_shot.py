"""Few-shot learning: settings, models, runs, errors."""

import csv
import dataclasses
import itertools
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import common
import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from experiment_scripts import ROOT, drawn, load_experiment
from published_files import prepare_cifar100
from settings.few_shot import FRESH, METHODS
from suites import fast_where

import tfbilevel as tb
from data_prep import glyphs

few_shot = load_experiment("few_shot")
SMALL = ["--filters", "4", "--outer-steps", "4", "--eval-every", "2", "--tasks", "2"]
SMALL += ["--no-rotations", "--validation-tasks", "4", "--test-tasks", "4"]
SMALL += ["--queries", "2", "--jit", "off"]


GLYPHS = glyphs.load(images_per_class=6)


@pytest.fixture(autouse=True)
def _few_glyphs(monkeypatch):
    """Drawn once: drawing all of them takes seconds."""
    monkeypatch.setattr(glyphs, "load", lambda: GLYPHS)


@pytest.fixture
def _float64():
    """Layers of double precision. The policy is remembered apart from `floatx`."""
    before = keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(before)


def parse(*flags):
    return few_shot.parse_args(["--out", "x", *flags])


def small(method, *flags):
    return parse("--method", method, "--tasks", "2", "--queries", "2", *flags)


SHAPE = (28, 28, 1)


def batch_of(args, seed=0):
    return next(iter(few_shot.draw(args, GLYPHS["test"], seed)))


def test_published_settings():
    """specs: stocbio 6, iaptt 4, penalty 5."""
    args = parse("--method", "anil", "--dataset", "mini-imagenet", "--shots", "5")
    assert (args.upper_lr, args.inner_lr, args.inner_steps) == (0.002, 0.05, 10)
    assert (args.tasks, args.outer_steps, args.queries) == (32, 2000, 5)
    args = parse("--method", "maml", "--dataset", "fc100")
    assert (args.upper_lr, args.inner_lr, args.inner_steps) == (0.001, 0.5, 3)
    args = parse("--method", "maml", "--dataset", "mini-imagenet")
    assert (args.upper_lr, args.inner_lr, args.filters) == (0.003, 0.01, 32)
    args = parse("--method", "itd-bio", "--dataset", "fc100")
    assert (args.inner_lr, args.inner_steps, args.outer_steps) == (0.1, 20, 1500)
    args = parse("--method", "fo-itd-bio", "--dataset", "mini-imagenet")
    assert args.outer_steps == 3000
    args = parse("--method", "iaptt-gm", "--dataset", "tiered-imagenet")
    assert (args.tasks, args.outer_steps, args.inner_steps) == (4, 80_000, 10)
    assert (args.inner_lr, args.final_lr, args.upper_lr) == (0.01, 0.001, 0.001)
    assert (args.head, args.net, args.filters) == ("conv", "pool-norm-relu", 32)
    assert (args.test_lr, args.test_steps, args.test_tasks) == (0.1, 10, 1000)
    args = parse("--method", "iaptt-gm", "--dataset", "omniglot")
    assert (args.head, args.net, args.filters) == ("cosine", "relu-pool-norm", 64)
    assert (args.inner_lr, args.final_lr, args.test_lr) == (0.4, 0.04, 0.4)
    args = parse("--method", "penalty", "--dataset", "omniglot")
    assert (args.tasks, args.outer_steps, args.inner_steps) == (30, 5000, 20)
    assert (args.upper_lr, args.lower_lr, args.test_lr) == (0.01, 0.01, 0.001)
    assert (args.weight, args.lower_weight, args.multiplier) == (0.01, 0.01, 1e-4)
    args = parse("--method", "penalty", "--dataset", "omniglot", "--ways", "20")
    assert (args.tasks, args.outer_steps) == (15, 10_000)
    args = parse("--method", "approxgrad", "--dataset", "mini-imagenet")
    assert (args.tasks, args.upper_lr, args.net) == (2, 0.001, "residual")
    assert (args.test_lr, args.test_steps) == (0.001, 100)
    flags = ["--method", "approxgrad", "--dataset", "mini-imagenet", "--shots", "5"]
    assert parse(*flags).outer_steps == 10_001
    args = parse("--method", "penalty", "--dataset", "fc100", "--net", "shifted")
    assert (args.tasks, args.filters, args.outer_steps) == (4, 32, 20_001)
    args = parse("--method", "maml", "--ways", "20")
    assert (args.inner_steps, args.inner_lr, args.test_steps) == (5, 0.1, 5)
    assert parse("--method", "maml").test_steps == 3
    args = parse("--method", "rhg", "--dataset", "fc100", "--net", "resnet12")
    assert args.head == "linear"
    args = parse("--method", "t-rhg", "--dataset", "mini-imagenet")
    assert (args.last, args.inner_steps) == (5, 10)
    args = parse("--method", "bda", "--dataset", "mini-imagenet")
    assert (args.alpha, args.alpha_decay, args.bda_rule) == (0.4, 0.9, "aggregated")
    args = parse("--method", "iaptt-gm", "--dataset", "mini-imagenet")
    assert (args.start_lr, args.queries) == (0.001, 15)
    for dataset, proximal, steps, filters in (
        ("omniglot", 2.0, 16, 64),
        ("mini-imagenet", 0.5, 10, 32),
    ):
        args = parse("--method", "imaml", "--dataset", dataset)
        assert (args.proximal, args.inner_steps, args.filters) == (
            proximal,
            steps,
            filters,
        )
        assert (args.net, args.queries, args.tasks) == ("relu-pool-norm", 15, 16)
        assert (args.inner_lr, args.upper_lr, args.solver_steps) == (0.1, 0.001, 5)
        assert args.test_tasks == 1000
        head = few_shot.build_networks(args, (84, 84, 3))[1]
        assert not any(np.any(v) for v in head.get_weights())
    args = parse("--method", "anil", "--dataset", "fc100")
    assert (args.upper_lr, args.inner_lr, args.inner_steps) == (0.001, 0.05, 20)
    assert (args.tasks, args.outer_steps) == (32, 1000)
    args = parse("--method", "itd-bio", "--dataset", "mini-imagenet")
    assert (args.upper_lr, args.inner_lr, args.inner_steps) == (0.002, 0.05, 10)
    assert args.outer_steps == 2000
    args = parse("--method", "fo-itd-bio", "--dataset", "fc100")
    assert (args.upper_lr, args.inner_lr, args.outer_steps) == (0.001, 0.1, 1500)
    args = parse("--method", "penalty", "--dataset", "mini-imagenet")
    assert args.tolerance == pytest.approx(0.01**0.5) and args.queries == 15
    assert (args.tasks, args.inner_steps) == (2, 20)
    for dataset, rate in (("omniglot", 0.01), ("mini-imagenet", 0.001)):
        args = parse("--method", "approxgrad", "--dataset", dataset)
        assert (args.solver_lr, args.lower_lr, args.damping) == (rate, rate, 1e-3)


def test_the_penalty_of_tasks_is_that_of_their_mean():
    """|mean of c_i|^2 over M tasks is 1/M^2 of the sum of |c_i|^2: penalty 5.1."""
    method = few_shot.build_model(parse("--method", "penalty"), SHAPE).method
    assert method.weight == pytest.approx(0.01 / 30)
    assert method.schedule.rate_decay == 0.99
    assert method.schedule.tolerance_decay == pytest.approx(0.9**0.5)
    method = few_shot.build_model(parse("--method", "approxgrad"), SHAPE).method
    assert method.solver.damping == pytest.approx(1e-3 * 30)


def test_every_meta_batch_of_a_test_has_heads_of_its_own(monkeypatch):
    asked, fresh_heads = [], few_shot.fresh_heads

    def watched(args, head, tasks):
        start = fresh_heads(args, head, tasks)

        def noted(number):
            tf.py_function(lambda n: asked.append(int(n)), [number], [])
            return start(number)

        return noted

    monkeypatch.setattr(few_shot, "fresh_heads", watched)
    args = small("penalty", "--tasks", "2", "--test-steps", "1")
    model = few_shot.build_model(args, SHAPE)
    judge = few_shot.Judge(args, model, GLYPHS["test"], 6, 7)
    assert len(judge.accuracies()) == 6
    assert sorted(asked) == [-3, -2, -1]


def test_new_tasks_are_learned_as_in_training_unless_asked():
    args = parse("--method", "anil", "--inner-steps", "3", "--inner-lr", "0.2")
    assert (args.test_steps, args.test_lr) == (3, 0.2)
    args = parse("--method", "anil", "--inner-steps", "3", "--test-steps", "9")
    assert (args.test_steps, args.test_lr) == (9, 0.4)
    args = parse("--method", "approxgrad", "--lower-lr", "0.02")
    assert (args.test_steps, args.test_lr) == (100, 0.02)
    args = parse("--method", "rhg", "--inner-lr", "0.2", "--inner-steps", "3")
    assert (args.test_steps, args.test_lr) == (10, 0.4)
    flags = ["--method", "penalty", "--dataset", "mini-imagenet", "--lower-lr", "0.02"]
    assert parse(*flags).test_lr == 0.001


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--method", "anil", "--last", "2"],
            "--last has no effect with --method anil",
        ),
        (["--method", "maml", "--head", "conv"], "--head must be linear or cosine"),
        (["--method", "penalty", "--head", "conv"], "which makes a new one"),
        (["--method", "t-rhg", "--last", "11"], "--last must not exceed"),
        (["--data-file", "x.npz"], "--data-file needs a --dataset with files"),
        (
            ["--dataset", "omniglot", "--data-file", "x.npz", "--data-dir", "y"],
            "--data-dir needs a --dataset with files, without --data-file",
        ),
        (
            ["--method", "meta-sgd", "--dataset", "fc100", "--test-lr", "0.1"],
            "--test-lr has no effect with --method meta-sgd",
        ),
        (["--test-tasks", "1"], "must be at least 2"),
        (["--data-dir", "x"], "--data-dir needs a --dataset with files"),
        (["--split", "sorted"], "--split needs --dataset omniglot"),
        (["--regularisation", "1"], "--regularisation needs --regulariser"),
        (["--quasi-norm-power", "1"], "needs --regulariser quasi-norm"),
        (
            ["--regulariser", "distance", "--quasi-norm-epsilon", "1"],
            "--quasi-norm-epsilon needs --regulariser quasi-norm",
        ),
        (
            ["--regulariser", "quasi-norm", "--quasi-norm-power", "1.5"],
            "--quasi-norm-power: must be above 0 and at most 1",
        ),
        (
            ["--regulariser", "quasi-norm-published", "--quasi-norm-epsilon", "0"],
            "--quasi-norm-epsilon: must be above zero",
        ),
        (["--head-blocks", "2"], "--head-blocks needs --head blocks"),
        (["--net", "resnet12", "--filters", "9"], "--filters needs a four-block"),
        (["--method", "rhg", "--head", "conv"], "feature map of at least 2 x 2"),
        (["--method", "meta-sgd", "--test-lr", "1"], "--test-lr has no effect"),
        (["--method", "rhg", "--head", "blocks", "--head-blocks", "4"], "at most 3"),
        (["--ways", "0"], "must be above zero"),
        (["--method", "bda", "--alpha", "2"], "--alpha: must be above 0 and at most 1"),
        (["--seed", "-1"], "--seed: must be from 0"),
        (
            ["--method", "penalty", "--regulariser", "distance"],
            "needs a head that has one start",
        ),
    ],
)
def test_bad_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*flags)
    assert error.value.code == 2
    written = capsys.readouterr().err
    assert message in written and written.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ways", "200"], "--ways must not exceed the 160 classes"),
        (["--shots", "5"], "--shots and query images must fit in every class"),
        (["--dataset", "mini-imagenet"], "needs --data-dir"),
        (["--dataset", "mini-imagenet", "--data-dir", "."], "does not exist"),
        (["--dataset", "fc100", "--data-dir", "."], "cifar100"),
    ],
)
def test_bad_data_is_one_line_before_anything_is_written(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        few_shot.main(["--out", "run", "--no-rotations", *flags])
    assert error.value.code == 2 and not (tmp_path / "run").exists()
    assert message in capsys.readouterr().err


def central_difference(model: Any, args: Any, width: float = 1e-7) -> float:
    """Relative error of the model's first upper gradient along random directions.

    The width must be small, the smaller the larger the network: it has kinks.
    """
    batch = batch_of(args)
    batch = tf.nest.map_structure(
        lambda leaf: tf.cast(leaf, "float64") if leaf.dtype == tf.float32 else leaf,
        batch,
    )
    # With biases of zero all black pixels would stand on ReLU's kink.
    moved = np.random.default_rng(9)
    x = [
        tf.convert_to_tensor(v.value) + 0.1 * moved.normal(size=v.shape)
        for v in model.upper_variables
    ]
    y = [
        tf.broadcast_to(tf.convert_to_tensor(v.value), [args.tasks, *v.shape])
        for v in model.lower.trainable_variables
    ]
    state = model.method.init(model.problem, x, y)
    step = tf.function(
        lambda x: model.problem.step(model.method, x, y, batch, state).upper_gradient,
        autograph=False,
    )
    objective = model.method.objective(model.problem, x, y, batch, state)
    value = tf.function(objective, autograph=False)
    gradient = step(x)
    errors = []
    for seed in range(2):
        generator = np.random.default_rng(seed)
        along = [generator.normal(size=leaf.shape) for leaf in x]

        def at(sign, along=along, width=width):
            moved = zip(x, along, strict=True)
            return float(value([leaf + sign * width * a for leaf, a in moved]))

        difference = (at(1) - at(-1)) / (2 * width)
        claimed = sum(
            float(tf.reduce_sum(g * a)) for g, a in zip(gradient, along, strict=True)
        )
        errors.append(abs(difference - claimed) / max(abs(claimed), 1e-3))
    return max(errors)


# The others differ from one of these in a setting: `methods_are_what_they_are_called`.
EXACT = ["meta-sgd", "anil", "bda", "iaptt-gm", "penalty"]


# A shared encoder, and an end of each task's own.
@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("method", fast_where("anil".__eq__, EXACT))
def test_meta_gradients_are_central_differences(method):
    """Of the script's own models, in float64: the losses, starts and features too."""
    args = small(method, "--filters", "3", "--inner-steps", "3")
    model = few_shot.build_model(args, (28, 28, 1))
    error = central_difference(model, args)
    assert error < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("regulariser", ["distance", "quasi-norm-published"])
def test_the_conv_head_and_the_regularisers_too(regulariser):
    flags = ["--filters", "3", "--inner-steps", "2", "--head", "blocks"]
    args = small("iaptt-gm", *flags, "--regulariser", regulariser)
    model = few_shot.build_model(args, (28, 28, 1))
    kernels = [v for v in model.lower.trainable_variables if len(v.shape) == 4]
    assert len(kernels) == 1  # adapted by each task
    assert central_difference(model, args) < 1e-4


def test_the_quasi_norms_are_their_formulas():
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    kernel, bias = (np.array(v, "float64") for v in network.get_weights())
    assert not bias.any()  # where a norm has no derivative
    forms = {
        "quasi-norm": lambda p, e: (p**2).sum() + e**2 * p.size,
        "quasi-norm-published": lambda p, e: (p**2).sum() ** 0.5 + e * p.size**0.5,
    }
    given = ["--quasi-norm-power", "0.9", "--quasi-norm-epsilon", "0.03"]
    cases = itertools.product(forms, (([], 0.5, 0.1), (given, 0.9, 0.03)))
    for name, (flags, q, epsilon) in cases:
        want = sum(forms[name](p, epsilon) ** (q / 2) for p in (kernel, bias))
        args = parse("--method", "rhg", "--regulariser", name, *flags)
        with tf.GradientTape() as tape:
            value = few_shot.regulariser(args, network, [])
        assert float(value) == pytest.approx(0.25 * want, rel=1e-5)
        for gradient in tape.gradient(value, network.trainable_variables):
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("ways", [2, 5, 20])
def test_every_class_of_a_confusion_matrix_can_be_read(ways):
    matrix = 15 * np.eye(ways, dtype=int)
    matrix[0, 1] = matrix[1, 0] = 2
    figure, axes = plt.subplots()
    common.draw_matrix(axes, matrix, 15)
    assert axes.get_xticks().tolist() == list(range(ways))
    assert axes.get_yticks().tolist() == list(range(ways))
    # The same blue for the same count in every task, whatever the largest one is.
    assert axes.images[0].get_clim() == (0, 15)
    shades = axes.images[0].cmap(np.array([15, 2]) / 15)[:, :3].mean(axis=1)
    for text in axes.texts:
        row, column = text.get_position()[::-1]
        assert text.get_text() == str(matrix[row, column])
        shade = shades[0] if matrix[row, column] == 15 else shades[1]
        letters = {"black": 0.0, "white": 1.0}[text.get_color()]
        assert abs(shade - letters) > 0.35
    assert len(axes.texts) == ways + 2
    plt.close(figure)


def test_curves_name_the_run_and_share_their_seconds(tmp_path, monkeypatch):
    run = common.Run(tmp_path / "run", {}, False)
    for step, loss in ((0, float("nan")), (2, 1.5)):
        accuracy = {"validation_accuracy": 40.0, "validation_accuracy_ci95": 2.0}
        losses = {"upper_loss": loss, "lower_loss": loss}
        run.log({"step": step, "seconds": step, **accuracy, **losses})
    args = small("anil", "--ways", "3")
    figure = drawn(monkeypatch, lambda: few_shot.draw_curves(run, args))
    assert figure.get_suptitle() == "anil, 3-way 1-shot glyphs"
    left, right = figure.axes
    assert left.get_title() and right.get_title()
    assert left.get_ylabel() == "percent" and right.get_ylabel() == "loss"
    assert left.get_xlim() == right.get_xlim()
    assert all(line.get_marker() != "None" for line in right.lines)


def test_bda_has_the_rule_of_its_own_code_too():
    for rule in ("aggregated", "bda-repo"):
        model = few_shot.build_model(small("bda", "--bda-rule", rule), SHAPE)
        assert model.method.aggregate.constant_lower == (rule == "bda-repo")


def one_task(method, *flags):
    """A model in float64 with one task, its step, and the gradient of g at the end."""
    args = small(method, "--filters", "2", *flags)
    args.tasks, args.ways = 1, 3
    model = few_shot.build_model(args, SHAPE)
    batch = tf.nest.map_structure(
        lambda leaf: tf.cast(leaf, "float64") if leaf.dtype == tf.float32 else leaf,
        batch_of(args),
    )
    x = [tf.convert_to_tensor(v.value) + 0.1 for v in model.upper_variables]
    y = [tf.convert_to_tensor(v.value)[None] for v in model.lower.trainable_variables]
    return model, x, y, batch


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_imaml_solves_its_proximal_system():
    """d_x / lambda is v of (H + lambda I) v = f_y: H v by differences of gradients."""
    # So large a lambda that H + lambda I is positive definite.
    flags = ["--proximal", "40", "--inner-lr", "0.01"]
    flags += ["--inner-steps", "2", "--solver-steps", "80"]
    model, x, y, batch = one_task("imaml", *flags)
    problem, method = model.problem, model.method
    state = method.init(problem, x, y)
    step = tf.function(
        lambda: problem.step(method, x, y, batch, state), autograph=False
    )()
    v = [gradient / 40 for gradient in step.upper_gradient]
    end = [leaf[0] for leaf in step.lower]
    own = tf.nest.map_structure(lambda leaf: leaf[0], batch)

    def gradient(loss, at, part):
        with tf.GradientTape() as tape:
            tape.watch(at)
            value = loss(x, at, part)
        return tape.gradient(value, at)

    def moved(width):
        return [p + width * leaf for p, leaf in zip(end, v, strict=True)]

    ends = [
        gradient(problem.one.lower_loss, moved(width), own.lower)
        for width in (1e-6, -1e-6)
    ]
    product = np.concatenate(
        [np.ravel(a - b) / 2e-6 for a, b in zip(*ends, strict=True)]
    )
    want = gradient(problem.one.upper_loss, end, own.upper)
    want = np.concatenate([np.ravel(leaf) for leaf in want])
    assert np.linalg.norm(product - want) < 1e-3 * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
def test_approxgrad_is_the_implicit_gradient_where_its_solver_ends():
    flags = ["--inner-steps", "1500", "--solver-lr", "0.02", "--damping", "5"]
    model, x, y, batch = one_task("approxgrad", *flags)
    found = []
    for solver in (model.method.solver, tb.Direct(damping=5.0)):
        method = dataclasses.replace(model.method, solver=solver)
        state = method.init(model.problem, x, y)
        step = tf.function(
            lambda m=method, s=state: model.problem.step(m, x, y, batch, s),
            autograph=False,
        )()
        found.append(np.concatenate([np.ravel(g) for g in step.upper_gradient]))
    assert np.linalg.norm(found[0] - found[1]) < 2e-3 * np.linalg.norm(found[1])


def test_imaml_pulls_towards_the_start():
    """At y = x the proximal term adds nothing to g and nothing to its gradient."""
    args = small("imaml", "--filters", "3")
    model = few_shot.build_model(args, (28, 28, 1))
    x = [tf.convert_to_tensor(v.value) for v in model.upper_variables]
    one = model.problem.one
    batch = tf.nest.map_structure(lambda leaf: leaf[0], batch_of(args).lower)
    moved = [leaf + 0.1 for leaf in x]
    count = sum(int(np.prod(leaf.shape)) for leaf in x)
    plain = few_shot.build_model(small("maml", "--filters", "3"), (28, 28, 1))
    for y, extra in ((x, 0.0), (moved, 0.5 * 2.0 * 0.01 * count)):
        difference = one.lower_loss(x, y, batch) - plain.problem.one.lower_loss(
            x, y, batch
        )
        np.testing.assert_allclose(difference, extra, rtol=1e-3, atol=1e-5)


def test_fresh_heads_differ_between_tasks_and_steps_and_are_seeded():
    for head, spread in (("cosine", 0.01), ("linear", 64**-0.5 / 3**0.5)):
        args = small("penalty", "--head", head)
        _, net = few_shot.build_networks(args, (28, 28, 1))
        start = few_shot.fresh_heads(args, net, 3)
        first, second = (start(tf.constant(step, tf.int64)) for step in (0, 1))
        assert first[0].shape == (3, 64, 5) and first[1].shape == (3, 5)
        np.testing.assert_array_equal(first[0], start(tf.constant(0, tf.int64))[0])
        assert not np.allclose(first[0], second[0])
        assert not np.allclose(first[0][0], first[0][1])
        np.testing.assert_allclose(np.std(first[0]), spread, rtol=0.1)


def test_methods_are_what_they_are_called():
    """Two flags and an argument are all that tells many of them apart."""
    built = {}
    for method in METHODS:
        args = small(method, "--filters", "3", "--outer-steps", "10")
        built[method] = few_shot.build_model(args, SHAPE).method
    unrolled = {n: m for n, m in built.items() if isinstance(m, tb.Unroll)}
    assert set(built) - set(unrolled) == {"imaml", "approxgrad", "penalty"}
    for name, method in unrolled.items():
        assert method.first_order == (name in ("fomaml", "fo-itd-bio"))
        assert method.last == (5 if name == "t-rhg" else None)
        assert method.end == ("pessimistic" if name == "iaptt-gm" else "final")
        assert (method.aggregate is not None) == (name == "bda")
        rate: Any = method.inner.learning_rate
        learned = method.inner.learned_rate
        if name in ("rhg", "t-rhg", "bda", "iaptt-gm"):  # cosine, 0.4 to 0.04
            assert float(rate(tf.constant(0))) == pytest.approx(0.4)
            assert float(rate(tf.constant(5))) == pytest.approx(0.22)
            assert float(rate(tf.constant(10))) == pytest.approx(0.04)
        else:
            assert rate is None
        assert (learned is not None) == (name == "meta-sgd")
    for name, method in built.items():
        inner = method.inner
        assert callable(inner.start) == (name in FRESH), name
    assert isinstance(built["imaml"].solver, tb.ConjugateGradient)
    assert isinstance(built["approxgrad"].solver, tb.GradientSolver)
    assert built["penalty"].optimizer_state == "reset"
    assert built["penalty"].multiplier_state == "reset"


def test_features_of_both_sets_share_statistics_only_where_published():
    for method, shared in (("anil", True), ("iaptt-gm", False)):
        args = small(method, "--filters", "3")
        model, batch = few_shot.build_model(args, SHAPE), batch_of(args)
        (queries, _), (supports, _) = task = tf.nest.map_structure(
            lambda leaf: leaf[0], batch
        )
        made = model._levels.prepare(model.upper, task).lower[0]
        alone = model.upper(supports)
        both = model.upper(tf.concat([queries, supports], axis=0))[len(queries) :]
        assert np.abs(alone - both).max() > 1e-3
        np.testing.assert_allclose(made, both if shared else alone, atol=1e-5)


@pytest.mark.slow
def test_every_part_has_its_own_classes_and_the_best_weights_are_tested(
    tmp_path, monkeypatch
):
    drawn, measured, models = {}, [], []
    draw, build = few_shot.draw, few_shot.build_model

    def recorded(args, some, seed, *first):
        (drawn[seed],) = (name for name, part in GLYPHS.items() if part is some)
        return draw(args, some, seed, *first)

    def accuracies(self, name=None):
        """Of validation tasks 50, 70, 60; of test tasks 10 and 20."""
        (model,) = models
        measured.append([np.array(v) for v in model.upper_variables])
        return np.full(4, [50.0, 70.0, 60.0, 10.0, 20.0][len(measured) - 1])

    monkeypatch.setattr(few_shot, "load_splits", lambda args: GLYPHS)
    monkeypatch.setattr(few_shot, "draw", recorded)
    monkeypatch.setattr(
        few_shot,
        "build_model",
        lambda *arguments: models.append(build(*arguments)) or models[0],
    )
    monkeypatch.setattr(few_shot.Judge, "accuracies", accuracies)
    summary = few_shot.main(["--out", str(tmp_path / "run"), *SMALL])
    del drawn[0]  # looked at for its size
    assert drawn == {1: "validation", 1000: "train", 2: "test"}
    assert summary["best_validation_step"] == 2
    assert summary["last_test_accuracy"] == 10 and summary["test_accuracy"] == 20
    start, best, end, last, tested = measured
    for index, value in enumerate(tested):
        np.testing.assert_array_equal(value, best[index])
        np.testing.assert_array_equal(last[index], end[index])
    assert np.abs(best[0] - start[0]).max() > 0 < np.abs(best[0] - end[0]).max()


@pytest.mark.slow
def test_a_run_its_files_and_a_killed_one(tmp_path, monkeypatch, capsys, power_fails):
    """Killed while it measures at step 4: the backup is of step 2."""
    out, cut = tmp_path / "run", tmp_path / "cut"
    with power_fails(few_shot.Judge, "accuracies", call=3, run=out, copy=cut):
        few_shot.main(["--out", str(out), *SMALL])
    printed = capsys.readouterr().out
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "metrics.csv", "summary.json", "curves.png"} < files
    assert {"confusion.png", "best.weights.h5"} < files
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    stored = json.loads((out / "summary.json").read_text())
    assert "transductive" in stored["batch_statistics"]
    best = max(float(row["validation_accuracy"]) for row in rows)
    assert stored["best_validation_accuracy"] == best
    assert 0 <= stored["test_accuracy"] <= 100 and stored["outer_steps"] == 4
    assert f"{stored['test_accuracy']:.2f}" in printed
    assert "percent on 4 test tasks (transductive)" in printed
    # As the command is run again after a kill.
    assert len(common.run.rows_of(cut)) == 2 and not (cut / "summary.json").exists()
    few_shot.main(["--out", str(cut), *SMALL, "--resume"])
    timing = {"seconds", "seconds_per_outer_step"}
    resumed = json.loads((cut / "summary.json").read_text())
    assert {k: v for k, v in resumed.items() if k not in timing} == {
        k: v for k, v in stored.items() if k not in timing
    }


@pytest.mark.slow
def test_the_script_is_run_as_a_file(tmp_path):
    """From another folder; it finds its own packages, and says what is wrong."""
    script = ROOT / "experiments" / "few_shot.py"
    done = subprocess.run(
        [sys.executable, script, "--out", "x", "--ways", "0"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "must be above zero" in done.stderr


def test_accuracy_and_interval_are_over_tasks(monkeypatch):
    args = small("anil", "--filters", "3")
    model = few_shot.build_model(args, (28, 28, 1))
    judge = few_shot.Judge(args, model, GLYPHS["test"], 5, 7)
    accuracies = judge.accuracies()
    assert accuracies.shape == (5,)
    # By hand: every task adapted alone by plain gradient descent on its head.
    batch = next(iter(few_shot.draw(args, GLYPHS["test"], 7)))
    kernel, bias = (np.array(v) for v in model.start.trainable_variables)
    for task in range(2):
        both = tf.concat([batch.upper[0][task], batch.lower[0][task]], axis=0)
        features = np.array(model.upper(both), "float64")
        query, support = features[:10], features[10:]
        w, b = kernel.astype("float64"), bias.astype("float64")
        for _ in range(args.test_steps):
            logits = support @ w + b
            error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            error = (error - np.eye(5)[batch.lower[1][task]]) / len(support)
            w, b = w - args.test_lr * support.T @ error, b - args.test_lr * error.sum(0)
        right = np.mean((query @ w + b).argmax(1) == batch.upper[1][task])
        np.testing.assert_allclose(accuracies[task], 100 * right)
    values = np.array([50.0, 70.0, 90.0])
    np.testing.assert_allclose(few_shot.interval(values), 1.96 * 20 / 3**0.5)


def published(folder: Any, kind: str) -> None:
    """Small files in exactly the published formats."""
    generator = np.random.default_rng(0)
    for number, split in enumerate(("train", "val", "test")):
        images = generator.integers(0, 255, (6 * 8, 84, 84, 3), dtype=np.uint8)
        names = [f"n{number}{c}" for c in range(6)]
        if kind == "mini-imagenet":
            members = {n: list(range(8 * i, 8 * i + 8)) for i, n in enumerate(names)}
            content = {"image_data": images, "class_dict": members}
            path = folder / f"mini-imagenet-cache-{split}.pkl"
            path.write_bytes(pickle.dumps(content, protocol=2))
            continue
        files = [
            np.frombuffer(tf.io.encode_png(image).numpy(), np.uint8) for image in images
        ]
        labels = {
            "label_specific": np.repeat(np.arange(6), 8),
            "label_specific_str": names,
        }
        (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps(files))
        (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(labels))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("dataset", "flags"),
    [
        ("mini-imagenet", ["--method", "iaptt-gm", "--filters", "4"]),
        ("tiered-imagenet", ["--method", "rhg", "--filters", "4", "--head", "linear"]),
    ],
)
def test_published_files_end_to_end(dataset, flags, tmp_path):
    published(tmp_path, dataset)
    own = [*SMALL[2:], "--outer-steps", "2", *flags]
    with pytest.warns(UserWarning, match="these files \\[6, 6, 6\\]"):
        summary = few_shot.main(
            ["--dataset", dataset, "--data-dir", str(tmp_path), "--out"]
            + [str(tmp_path / "run"), *own]
        )
    assert summary["dataset"] == dataset and 0 <= summary["test_accuracy"] <= 100


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_fc100_end_to_end(tmp_path):
    prepare_cifar100(tmp_path)
    summary = few_shot.main(
        ["--dataset", "fc100", "--data-dir", str(tmp_path / "tfds"), *SMALL]
        + ["--method", "itd-bio", "--inner-steps", "3", "--out", str(tmp_path / "run")]
    )
    assert summary["net"] == "norm-relu-pool"
    assert 0 <= summary["test_accuracy"] <= 100
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["split"] is None  # Omniglot's


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("method", "network"), [("iaptt-gm", "resnet12"), ("penalty", "residual")]
)
def test_meta_gradients_of_the_large_networks(method, network):
    flags = ["--net", network, "--head", "cosine", "--inner-steps", "1"]
    args = parse("--method", method, *flags, "--tasks", "1", "--queries", "1")
    args.ways = 2
    model = few_shot.build_model(args, SHAPE)
    assert central_difference(model, args, width=1e-9) < 1e-4


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        # 64 features and a bias for each class: penalty.md 10.
        (["--method", "penalty", "--dataset", "omniglot"], 325),
        (["--method", "penalty", "--dataset", "omniglot", "--ways", "20"], 1300),
        (["--method", "penalty", "--dataset", "mini-imagenet"], 1925),
        (["--method", "rhg", "--dataset", "mini-imagenet", "--head", "linear"], 4005),
        # 9 * 32 * 32 + 32 + 64 of a block, 128 * 5 + 5.
        (["--method", "rhg", "--dataset", "mini-imagenet"], 9312 + 645),
        (["--method", "maml", "--dataset", "fc100"], 1285),
    ],
)
def test_parameter_counts_of_the_heads(flags, count):
    args = parse(*flags)
    shape = {"omniglot": SHAPE, "fc100": (32, 32, 3)}.get(args.dataset, (84, 84, 3))
    assert few_shot.build_networks(args, shape)[1].count_params() == count
