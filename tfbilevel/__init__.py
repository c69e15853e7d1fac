"""Gradient-based bilevel optimization for TensorFlow 2 and Keras 3."""

import sys as _sys

from tfbilevel import compat as compat
from tfbilevel._calculus.derivatives import (
    UnconnectedGradientError as UnconnectedGradientError,
)
from tfbilevel._calculus.lost_derivatives import (
    MissingSecondDerivativeError as MissingSecondDerivativeError,
)
from tfbilevel._check.hypergradient import HypergradientReport as HypergradientReport
from tfbilevel._check.hypergradient import check_hypergradient as check_hypergradient
from tfbilevel._check.memory_estimate import MemoryEstimate as MemoryEstimate
from tfbilevel._check.memory_estimate import memory_estimate as memory_estimate
from tfbilevel._check.second_derivatives import (
    SecondDerivativesReport as SecondDerivativesReport,
)
from tfbilevel._check.second_derivatives import (
    check_second_derivatives as check_second_derivatives,
)
from tfbilevel._core import schedules as schedules
from tfbilevel._core.aggregation import Aggregation as Aggregation
from tfbilevel._core.batches import Batches as Batches
from tfbilevel._core.batches import StackedBatches as StackedBatches
from tfbilevel._core.inner_solver import InnerSolver as InnerSolver
from tfbilevel._core.method import Method as Method
from tfbilevel._core.method import Step as Step
from tfbilevel._core.microbatched import microbatched as microbatched
from tfbilevel._core.nonfinite import DivergenceWarning as DivergenceWarning
from tfbilevel._core.nonfinite import NonFiniteError as NonFiniteError
from tfbilevel._core.prepared import Prepared as Prepared
from tfbilevel._core.problem import Problem as Problem
from tfbilevel._core.schedules import Constant as Constant
from tfbilevel._core.schedules import CosineDecay as CosineDecay
from tfbilevel._core.schedules import Geometric as Geometric
from tfbilevel._core.schedules import InversePower as InversePower
from tfbilevel._core.schedules import LinearRamp as LinearRamp
from tfbilevel._core.schedules import Schedule as Schedule
from tfbilevel._jobs.cleaning.label_cleaner import LabelCleaner as LabelCleaner
from tfbilevel._jobs.few_shot.accuracy import FewShotScore as FewShotScore
from tfbilevel._jobs.few_shot.learner import FewShotLearner as FewShotLearner
from tfbilevel._jobs.tuning import hyper as hyper
from tfbilevel._jobs.tuning.tuner import HyperparameterTuner as HyperparameterTuner
from tfbilevel._keras.backup import Backup as Backup
from tfbilevel._keras.dynamic import Dynamic as Dynamic
from tfbilevel._keras.dynamic import DynamicResult as DynamicResult
from tfbilevel._keras.dynamic import DynamicState as DynamicState
from tfbilevel._keras.functional import Functional as Functional
from tfbilevel._keras.functional import functional as functional
from tfbilevel._keras.index_batches import index_batches as index_batches
from tfbilevel._keras.layers.example_weights import ExampleWeights as ExampleWeights
from tfbilevel._keras.layers.feature_penalties import (
    FeaturePenalties as FeaturePenalties,
)
from tfbilevel._keras.layers.label_correction import LabelCorrection as LabelCorrection
from tfbilevel._keras.layers.loss_weights import LossWeights as LossWeights
from tfbilevel._keras.layers.transition_matrix import (
    TransitionMatrix as TransitionMatrix,
)
from tfbilevel._keras.losses import soft_cross_entropy as soft_cross_entropy
from tfbilevel._keras.losses import sparse_cross_entropy as sparse_cross_entropy
from tfbilevel._keras.model import BilevelModel as BilevelModel
from tfbilevel._keras.pair import pair as pair
from tfbilevel._linear_solvers import MINRES as MINRES
from tfbilevel._linear_solvers import ConjugateGradient as ConjugateGradient
from tfbilevel._linear_solvers import Direct as Direct
from tfbilevel._linear_solvers import FixedPoint as FixedPoint
from tfbilevel._linear_solvers import GradientSolver as GradientSolver
from tfbilevel._linear_solvers import Identity as Identity
from tfbilevel._linear_solvers import IterativeSolver as IterativeSolver
from tfbilevel._linear_solvers import LinearSolution as LinearSolution
from tfbilevel._linear_solvers import LinearSolver as LinearSolver
from tfbilevel._linear_solvers import LinearSystem as LinearSystem
from tfbilevel._linear_solvers import Neumann as Neumann
from tfbilevel._linear_solvers import (
    NormalConjugateGradient as NormalConjugateGradient,
)
from tfbilevel._linear_solvers import Nystrom as Nystrom
from tfbilevel._methods.hypergradient.finite_difference import (
    FiniteDifference as FiniteDifference,
)
from tfbilevel._methods.hypergradient.forward_unroll import (
    ForwardUnroll as ForwardUnroll,
)
from tfbilevel._methods.hypergradient.implicit import Implicit as Implicit
from tfbilevel._methods.hypergradient.persistent_es import (
    PersistentES as PersistentES,
)
from tfbilevel._methods.hypergradient.rank_one import RankOne as RankOne
from tfbilevel._methods.hypergradient.unroll import Unroll as Unroll
from tfbilevel._methods.penalty.augmented_lagrangian import (
    AugmentedLagrangian as AugmentedLagrangian,
)
from tfbilevel._methods.penalty.bome import BOME as BOME
from tfbilevel._methods.penalty.bvfsm import BVFSM as BVFSM
from tfbilevel._methods.penalty.f2sa import F2SA as F2SA
from tfbilevel._methods.penalty.f3sa import F3SA as F3SA
from tfbilevel._methods.penalty.gaffa import GAFFA as GAFFA
from tfbilevel._methods.penalty.gradient_norm import GradientNorm as GradientNorm
from tfbilevel._methods.penalty.meha import MEHA as MEHA
from tfbilevel._methods.penalty.penalty_schedule import (
    PenaltySchedule as PenaltySchedule,
)
from tfbilevel._methods.penalty.value_gap import ValueGap as ValueGap
from tfbilevel._methods.stochastic import BAMM as BAMM
from tfbilevel._methods.stochastic import BSA as BSA
from tfbilevel._methods.stochastic import FSLA as FSLA
from tfbilevel._methods.stochastic import MRBO as MRBO
from tfbilevel._methods.stochastic import SABA as SABA
from tfbilevel._methods.stochastic import SOBA as SOBA
from tfbilevel._methods.stochastic import SRBA as SRBA
from tfbilevel._methods.stochastic import SUSTAIN as SUSTAIN
from tfbilevel._methods.stochastic import TTSA as TTSA
from tfbilevel._methods.stochastic import VRBO as VRBO
from tfbilevel._methods.stochastic import AmIGO as AmIGO
from tfbilevel._methods.stochastic import StocBiO as StocBiO
from tfbilevel._minimize import Point as Point
from tfbilevel._minimize import Result as Result
from tfbilevel._minimize import minimize as minimize
from tfbilevel._optimizers.lazy_adam import LazyAdam as LazyAdam
from tfbilevel._optimizers.update_rule import OptimizerState as OptimizerState
from tfbilevel._optimizers.update_rule import UpdateRule as UpdateRule
from tfbilevel._optimizers.update_rule import differentiable as differentiable
from tfbilevel._tasks.over_tasks import over_tasks as over_tasks
from tfbilevel._version import __version__ as __version__

# These modules are in rooms. So that `import tfbilevel.hyper` and
# `from tfbilevel.schedules import LinearRamp` find them, they have these names too.
_sys.modules["tfbilevel.hyper"] = hyper
_sys.modules["tfbilevel.schedules"] = schedules
