"""Gradient methods: how the losses or gradients of several tasks become one update."""

# The order of the imports is the order of the registry.
# isort: off
from recon.methods.base import Aggregator, GramianAggregator, Method, Weighting
from recon.methods.registry import MethodEntry, entry, get, names, parse, register
from recon.methods.torchjd_adapter import wrap
from recon.methods.weightings import DWA, UW, Joint
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
# isort: on

__all__ = [
    "DWA",
    "IMTLG",
    "MGDA",
    "PELTR",
    "UW",
    "Aggregator",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradVac",
    "GramianAggregator",
    "Joint",
    "Method",
    "MethodEntry",
    "MoDo",
    "NashMTL",
    "PCGrad",
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
