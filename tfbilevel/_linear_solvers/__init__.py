"""Linear solvers for g_yy v = f_y that use only Hessian-vector products."""

from tfbilevel._linear_solvers.base import IterativeSolver as IterativeSolver
from tfbilevel._linear_solvers.base import LinearSolution as LinearSolution
from tfbilevel._linear_solvers.base import LinearSolver as LinearSolver
from tfbilevel._linear_solvers.base import LinearSystem as LinearSystem
from tfbilevel._linear_solvers.conjugate_gradient import (
    ConjugateGradient as ConjugateGradient,
)
from tfbilevel._linear_solvers.direct import Direct as Direct
from tfbilevel._linear_solvers.fixed_point import FixedPoint as FixedPoint
from tfbilevel._linear_solvers.gradient_solver import GradientSolver as GradientSolver
from tfbilevel._linear_solvers.identity import Identity as Identity
from tfbilevel._linear_solvers.minres import MINRES as MINRES
from tfbilevel._linear_solvers.neumann import Neumann as Neumann
from tfbilevel._linear_solvers.normal_conjugate_gradient import (
    NormalConjugateGradient as NormalConjugateGradient,
)
from tfbilevel._linear_solvers.nystrom import Nystrom as Nystrom
