"""Stochastic methods, for noisy lower batches and inexact inner solves."""

from tfbilevel._methods.stochastic.bamm import BAMM as BAMM
from tfbilevel._methods.stochastic.bsa import BSA as BSA
from tfbilevel._methods.stochastic.stocbio import StocBiO as StocBiO
from tfbilevel._methods.stochastic.ttsa import TTSA as TTSA
