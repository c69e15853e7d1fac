"""Schedules: numbers that change from one outer step to the next, such as penalty
weights, tolerances and learning rates. `tb.schedules.LinearRamp` is `tb.LinearRamp`."""

from tfbilevel._core.schedules import Constant as Constant
from tfbilevel._core.schedules import CosineDecay as CosineDecay
from tfbilevel._core.schedules import Geometric as Geometric
from tfbilevel._core.schedules import InversePower as InversePower
from tfbilevel._core.schedules import LinearRamp as LinearRamp
from tfbilevel._core.schedules import Schedule as Schedule
