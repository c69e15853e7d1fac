"""Interfaces of other toolboxes: `Dynamic` has the published arguments of `bohml`."""

from tfbilevel._keras.dynamic import Dynamic as Dynamic
from tfbilevel._keras.dynamic import DynamicResult as DynamicResult
from tfbilevel._keras.dynamic import DynamicState as DynamicState
