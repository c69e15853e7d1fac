"""The penalty method and ApproxGrad, as used in several scripts."""

import argparse
import dataclasses
from typing import Any

import keras

import tfbilevel as tb
from common.flags import Parser, at_least, finite
from common.optimizers import adam
from data_prep.command_line import positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class InversionFree:
    """Settings of `penalty` or `approxgrad` in the experiments of Mehra and Hamm
    (2021), arXiv:1911.03432; `None` where the method has no such setting.

    Attributes:
        inner_steps: T; also the steps of approxgrad's linear solver.
        upper_lr, lower_lr: Adam's rates at the two levels.
        weight, lower_weight, tolerance, multiplier: initial values of penalty.
        solver_lr, damping: settings of approxgrad's linear solver.
        halve_every: approxgrad: the interval at which both rates are halved, in a unit
            that the script chooses.
    """

    inner_steps: int | None = None
    upper_lr: float | None = None
    lower_lr: float | None = None
    weight: float | None = None
    lower_weight: float | None = None
    tolerance: float | None = None
    multiplier: float | None = None
    solver_lr: float | None = None
    damping: float | None = None
    halve_every: int | None = None

    @staticmethod
    def add_flags(parser: Parser, unit: str | None) -> None:
        """Add a flag for every setting; `unit` is that of --halve-every, if any."""
        add = parser.add_argument
        add("--inner-steps", type=positive(int), help="T; approxgrad: solver steps too")
        add("--upper-lr", type=positive(float))
        add("--lower-lr", type=positive(float))
        add("--weight", type=positive(float), help="penalty: rho at the start")
        add(
            "--lower-weight",
            type=at_least(float, 0),
            help="penalty: lambda at the start",
        )
        add("--tolerance", type=positive(float), help="penalty: epsilon at the start")
        add("--multiplier", type=finite, help="penalty: nu at the start")
        add("--solver-lr", type=positive(float), help="approxgrad: for its system")
        add("--damping", type=at_least(float, 0), help="approxgrad, aid-cg")
        if unit is None:
            parser.set_defaults(halve_every=None)
            return
        add("--halve-every", type=positive(int), help=f"approxgrad: {unit} per halving")

    @staticmethod
    def method(args: argparse.Namespace, unit: int = 1) -> tb.Method:
        """The method that the flags describe; `unit` in outer steps."""
        if args.solver_lr is None:
            return tb.AugmentedLagrangian(
                adam(args.lower_lr),
                args.inner_steps,
                weight=args.weight,
                lower_weight=args.lower_weight,
                atol=args.tolerance,
                initial_multiplier=args.multiplier,
                # The published test squares norms that are squared already. Its factor
                # of 0.9 corresponds to the root of 0.9 for the norm, as do tolerances.
                schedule=tb.PenaltySchedule(tolerance_decay=0.9**0.5),
            )
        rate = halved(args.lower_lr, args.halve_every, unit * args.inner_steps)
        solver = tb.GradientSolver(
            adam(args.solver_lr),
            args.inner_steps,
            "residual",
            rtol=0.0,
            damping=args.damping,
        )
        inner = tb.InnerSolver(adam(rate), args.inner_steps, optimizer_state="carry")
        return tb.Implicit(inner, solver)

    @staticmethod
    def upper_rate(args: argparse.Namespace, unit: int = 1) -> Any:
        """The rate of the upper optimizer, which approxgrad halves as well."""
        return halved(args.upper_lr, args.halve_every, unit)


def halved(rate: float, every: int | None, unit: int) -> Any:
    if every is None:
        return rate
    return keras.optimizers.schedules.ExponentialDecay(
        rate, every * unit, 0.5, staircase=True
    )
