"""Stochastic methods: noisy lower batches, no exact inner solve."""

from tfbilevel._stochastic._bamm import BAMM as BAMM
from tfbilevel._stochastic._bsa import BSA as BSA
from tfbilevel._stochastic._stocbio import StocBiO as StocBiO
from tfbilevel._stochastic._ttsa import TTSA as TTSA
