"""Linear solvers for g_yy v = f_y, from Hessian-vector products alone."""

from tfbilevel._linear_solvers._base import IterativeSolver as IterativeSolver
from tfbilevel._linear_solvers._base import LinearSolution as LinearSolution
from tfbilevel._linear_solvers._base import LinearSolver as LinearSolver
from tfbilevel._linear_solvers._base import LinearSystem as LinearSystem
from tfbilevel._linear_solvers._conjugate_gradient import (
    ConjugateGradient as ConjugateGradient,
)
from tfbilevel._linear_solvers._direct import Direct as Direct
from tfbilevel._linear_solvers._fixed_point import FixedPoint as FixedPoint
from tfbilevel._linear_solvers._gradient_solver import GradientSolver as GradientSolver
from tfbilevel._linear_solvers._neumann import Neumann as Neumann
from tfbilevel._linear_solvers._normal_conjugate_gradient import (
    NormalConjugateGradient as NormalConjugateGradient,
)
