"""Each fault of TensorFlow or Keras in one file, which goes the day it is fixed."""

from tfbilevel._workarounds import backend as backend  # an error before all others
from tfbilevel._workarounds.derivatives import right_derivatives as right_derivatives
from tfbilevel._workarounds.inline_functions import functions_inline as functions_inline
