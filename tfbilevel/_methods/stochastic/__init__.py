"""Stochastic methods, for noisy lower batches and inexact inner solves."""

from tfbilevel._methods.stochastic.amigo import AmIGO as AmIGO
from tfbilevel._methods.stochastic.bamm import BAMM as BAMM
from tfbilevel._methods.stochastic.bsa import BSA as BSA
from tfbilevel._methods.stochastic.fsla import FSLA as FSLA
from tfbilevel._methods.stochastic.mrbo import MRBO as MRBO
from tfbilevel._methods.stochastic.saba import SABA as SABA
from tfbilevel._methods.stochastic.soba import SOBA as SOBA
from tfbilevel._methods.stochastic.srba import SRBA as SRBA
from tfbilevel._methods.stochastic.stocbio import StocBiO as StocBiO
from tfbilevel._methods.stochastic.sustain import SUSTAIN as SUSTAIN
from tfbilevel._methods.stochastic.ttsa import TTSA as TTSA
from tfbilevel._methods.stochastic.vrbo import VRBO as VRBO
