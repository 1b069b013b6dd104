"""Gradient methods: how the losses or gradients of several tasks become one update."""

# The order of the imports is the order of the registry.
# isort: off
from recon.methods.base import Aggregator, FeatureMethod, GramianAggregator, Method, Weighting
from recon.methods.registry import MethodEntry, entry, get, names, parse, register
from recon.methods.weightings import DWA, UW, Joint
from recon.methods.aggregators import MGDA, CAGrad, PCGrad
from recon.methods.rotograd import RotoGrad
# isort: on

__all__ = [
    "DWA",
    "MGDA",
    "UW",
    "Aggregator",
    "CAGrad",
    "FeatureMethod",
    "GramianAggregator",
    "Joint",
    "Method",
    "MethodEntry",
    "PCGrad",
    "RotoGrad",
    "Weighting",
    "entry",
    "get",
    "names",
    "parse",
    "register",
]
