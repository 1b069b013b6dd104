"""Gradient methods: how the losses or gradients of several tasks become one update."""

# The order of the imports is the order of the registry.
# isort: off
from recon.methods.aggregator import Aggregator, GramianAggregator
from recon.methods.feature_method import FeatureMethod
from recon.methods.base import Method
from recon.methods.weighting import Weighting
from recon.methods.composition import Composition
from recon.methods.registry import MethodEntry, entry, get, names, register
from recon.methods.parsing import parse
from recon.methods.torchjd_adapter import wrap
from recon.methods.weightings import DWA, UW, Joint
from recon.methods.gradnorm import GradNorm, NormWeighting
from recon.methods.random_weighting import RLW
from recon.methods.scalarizations import GLS, IMTLL, STCH
from recon.methods.famo import FAMO
from recon.methods.pcgrad import PCGrad
from recon.methods.cagrad import CAGrad
from recon.methods.mgda import MGDA
from recon.methods.gradvac import GradVac
from recon.methods.graddrop import GradDrop
from recon.methods.equal_footing import IMTLG, ConFIG
from recon.methods.fairness import FairGrad, NashMTL
from recon.methods.aligned_mtl import AlignedMTL
from recon.methods.dual_cone import DualProj, UPGrad
from recon.methods.tracked_weights import MoDo, SDMGrad
from recon.methods.excess_mtl import ExcessMTL
from recon.methods.pe_ltr import PELTR
from recon.methods.rotograd import RotoGrad
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
    "entry",
    "get",
    "names",
    "parse",
    "register",
    "wrap",
]
