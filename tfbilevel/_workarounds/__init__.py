"""Workarounds for faults of TensorFlow and Keras, one file per fault."""

from tfbilevel._workarounds import backend as backend  # an error before all others
from tfbilevel._workarounds.derivatives import right_derivatives as right_derivatives
from tfbilevel._workarounds.inline_functions import functions_inline as functions_inline
