"""Gradient-based bilevel optimization for TensorFlow 2 and Keras 3."""

from tfbilevel._aggregation import Aggregation as Aggregation
from tfbilevel._augmented_lagrangian import (
    AugmentedLagrangian as AugmentedLagrangian,
)
from tfbilevel._batches import Batches as Batches
from tfbilevel._batches import StackedBatches as StackedBatches
from tfbilevel._check import HypergradientReport as HypergradientReport
from tfbilevel._check import check_hypergradient as check_hypergradient
from tfbilevel._derivatives import UnconnectedGradientError as UnconnectedGradientError
from tfbilevel._differentiable import OptimizerState as OptimizerState
from tfbilevel._differentiable import UpdateRule as UpdateRule
from tfbilevel._differentiable import differentiable as differentiable
from tfbilevel._dynamic import Dynamic as Dynamic
from tfbilevel._dynamic import DynamicResult as DynamicResult
from tfbilevel._dynamic import DynamicState as DynamicState
from tfbilevel._finite import DivergenceWarning as DivergenceWarning
from tfbilevel._finite import NonFiniteError as NonFiniteError
from tfbilevel._finite_difference import FiniteDifference as FiniteDifference
from tfbilevel._forward_unroll import ForwardUnroll as ForwardUnroll
from tfbilevel._functional import Functional as Functional
from tfbilevel._functional import functional as functional
from tfbilevel._gradient_norm import GradientNorm as GradientNorm
from tfbilevel._implicit import Implicit as Implicit
from tfbilevel._inner import InnerSolver as InnerSolver
from tfbilevel._keras.backup import Backup as Backup
from tfbilevel._keras.index_batches import index_batches as index_batches
from tfbilevel._keras.losses import soft_cross_entropy as soft_cross_entropy
from tfbilevel._keras.losses import sparse_cross_entropy as sparse_cross_entropy
from tfbilevel._layers import ExampleWeights as ExampleWeights
from tfbilevel._layers import FeaturePenalties as FeaturePenalties
from tfbilevel._lazy_adam import LazyAdam as LazyAdam
from tfbilevel._linear_solvers import ConjugateGradient as ConjugateGradient
from tfbilevel._linear_solvers import Direct as Direct
from tfbilevel._linear_solvers import FixedPoint as FixedPoint
from tfbilevel._linear_solvers import GradientSolver as GradientSolver
from tfbilevel._linear_solvers import IterativeSolver as IterativeSolver
from tfbilevel._linear_solvers import LinearSolution as LinearSolution
from tfbilevel._linear_solvers import LinearSolver as LinearSolver
from tfbilevel._linear_solvers import LinearSystem as LinearSystem
from tfbilevel._linear_solvers import Neumann as Neumann
from tfbilevel._linear_solvers import (
    NormalConjugateGradient as NormalConjugateGradient,
)
from tfbilevel._lost_derivatives import (
    MissingSecondDerivativeError as MissingSecondDerivativeError,
)
from tfbilevel._method import Method as Method
from tfbilevel._method import Step as Step
from tfbilevel._minimize import Point as Point
from tfbilevel._minimize import Result as Result
from tfbilevel._minimize import minimize as minimize
from tfbilevel._model import BilevelModel as BilevelModel
from tfbilevel._over_tasks import over_tasks as over_tasks
from tfbilevel._pair import pair as pair
from tfbilevel._prepared import Prepared as Prepared
from tfbilevel._problem import Problem as Problem
from tfbilevel._rank_one import RankOne as RankOne
from tfbilevel._schedules import Constant as Constant
from tfbilevel._schedules import CosineDecay as CosineDecay
from tfbilevel._schedules import Geometric as Geometric
from tfbilevel._schedules import InversePower as InversePower
from tfbilevel._schedules import LinearRamp as LinearRamp
from tfbilevel._schedules import Schedule as Schedule
from tfbilevel._second_derivatives import (
    SecondDerivativesReport as SecondDerivativesReport,
)
from tfbilevel._second_derivatives import (
    check_second_derivatives as check_second_derivatives,
)
from tfbilevel._stochastic import BAMM as BAMM
from tfbilevel._stochastic import BSA as BSA
from tfbilevel._stochastic import TTSA as TTSA
from tfbilevel._stochastic import StocBiO as StocBiO
from tfbilevel._unroll import Unroll as Unroll
from tfbilevel._value_gap import ValueGap as ValueGap
from tfbilevel._version import __version__ as __version__
