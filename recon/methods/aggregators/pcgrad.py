"""PCGrad: gradients projected onto the normal planes of those they conflict with."""

from __future__ import annotations

from torchjd.aggregation import PCGradWeighting

from recon.methods.bases.torchjd_aggregator import TorchJDAggregator
from recon.methods.registry import register


@register(
    "pcgrad",
    title="Projecting conflicting gradients",
    paper="Yu, Kumar, Gupta, Levine, Hausman, Finn, NeurIPS 2020, arXiv 2001.06782, Algorithm 1",
    scale="The sum of the projected task gradients: the sum of the task gradients where none conflict.",
)
class PCGrad(TorchJDAggregator):
    """Projects each gradient onto the normal plane of those it conflicts with, in random order, and sums.

    A task whose gradient is zero is left out.

    Args:
        seed: of the method's own random stream, which gives T orders per step (`torch.randperm` of a
            `torch.Generator` with that seed). The global random state is neither read nor changed, and the
            stream is part of the state_dict.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(PCGradWeighting(), seed)
        self.seed = seed
