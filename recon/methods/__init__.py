"""Gradient methods: how the losses or gradients of several tasks become one update."""

# The order of the imports is the order of the registry.
# isort: off
from recon.methods.base import Aggregator, FeatureMethod, GramianAggregator, Method, Weighting
from recon.methods.composition import Composition
from recon.methods.registry import MethodEntry, entry, get, names, register
from recon.methods.parsing import parse
from recon.methods.weightings import DWA, UW, Joint
from recon.methods.gradnorm import GradNorm, NormWeighting
from recon.methods.random_weighting import RLW
from recon.methods.scalarizations import GLS, IMTLL, STCH
from recon.methods.famo import FAMO
from recon.methods.aggregators import MGDA, CAGrad, PCGrad
from recon.methods.rotograd import RotoGrad
# isort: on

__all__ = [
    "DWA",
    "FAMO",
    "GLS",
    "IMTLL",
    "MGDA",
    "RLW",
    "STCH",
    "UW",
    "Aggregator",
    "CAGrad",
    "Composition",
    "FeatureMethod",
    "GradNorm",
    "GramianAggregator",
    "Joint",
    "Method",
    "MethodEntry",
    "NormWeighting",
    "PCGrad",
    "RotoGrad",
    "Weighting",
    "entry",
    "get",
    "names",
    "parse",
    "register",
]
