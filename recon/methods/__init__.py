"""Gradient methods: how the losses or gradients of several tasks become one update."""

# The order of the imports is the order of the registry.
# isort: off
from recon.methods.bases.aggregator import Aggregator, GramianAggregator
from recon.methods.bases.feature_method import FeatureMethod
from recon.methods.bases.method import Method
from recon.methods.bases.weighting import Weighting
from recon.methods.composition import Composition
from recon.methods.registry import MethodEntry, entry, get, names, register
from recon.methods.parsing import parse
from recon.methods.torchjd_adapter import wrap
from recon.methods.weightings.joint import Joint
from recon.methods.weightings.uw import UW
from recon.methods.weightings.dwa import DWA
from recon.methods.weightings.gradnorm import GradNorm, NormWeighting
from recon.methods.weightings.random_weighting import RLW
from recon.methods.weightings.scalarizations import GLS, IMTLL, STCH
from recon.methods.weightings.famo import FAMO
from recon.methods.aggregators.pcgrad import PCGrad
from recon.methods.aggregators.cagrad import CAGrad
from recon.methods.aggregators.mgda import MGDA
from recon.methods.aggregators.gradvac import GradVac
from recon.methods.aggregators.graddrop import GradDrop
from recon.methods.aggregators.equal_footing import IMTLG, ConFIG
from recon.methods.aggregators.fairness import FairGrad, NashMTL
from recon.methods.aggregators.aligned_mtl import AlignedMTL
from recon.methods.aggregators.dual_cone import DualProj, UPGrad
from recon.methods.aggregators.tracked_weights import MoDo, SDMGrad
from recon.methods.aggregators.excess_mtl import ExcessMTL
from recon.methods.aggregators.pe_ltr import PELTR
from recon.methods.rotograd import RotoGrad
from recon.methods.updates.step import backward
from recon.methods.window import Window
# isort: on

__all__ = [
    "DWA",
    "FAMO",
    "GLS",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "PELTR",
    "RLW",
    "STCH",
    "UW",
    "Aggregator",
    "AlignedMTL",
    "CAGrad",
    "Composition",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "FeatureMethod",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GramianAggregator",
    "Joint",
    "Method",
    "MethodEntry",
    "MoDo",
    "NashMTL",
    "NormWeighting",
    "PCGrad",
    "RotoGrad",
    "SDMGrad",
    "UPGrad",
    "Weighting",
    "Window",
    "backward",
    "entry",
    "get",
    "names",
    "parse",
    "register",
    "wrap",
]
