"""MTAN: SegNet's trunk, and a soft attention mask over each of its stages for each task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recon.models.segnet import STAGES, SegNetTrunk, Stage, conv_block, draw_weights, head, stage_widths


class MTAN(SegNetTrunk):
    """The multi-task attention network of Liu, Johns and Davison (CVPR 2019, arXiv 1803.10704), section 3.

    Each task has an attention module for each stage of the trunk. From the stage's first features and the task's
    features of the stage before, it computes a mask for the stage's last features (section 3.2, eqs. (1) to (3)). All
    tasks share the convolutions that carry the masked features on to the next stage. It is the network that Recon (Shi
    et al., ICLR 2023) trains on NYUv2.

    `encoder_att`, `decoder_att` and `heads` are the tasks' own. All other layers have the names in Recon's
    published conflict scores; see `SegNetTrunk`.

    Args:
        tasks: `{task name: channels of its output}`.
        in_channels: channels of the input image.
        width: channels of the first stage; 64 in the papers.
    """

    def __init__(self, tasks: Mapping[str, int], in_channels: int = 3, width: int = 64) -> None:
        super().__init__(in_channels, width)
        widths = stage_widths(width)
        coarser, finer = [*widths[1:], widths[-1]], [widths[0], *widths[:-1]]
        self.encoder_block_att = nn.ModuleList(map(conv_block, widths, coarser))
        self.decoder_block_att = nn.ModuleList(map(conv_block, widths, finer))
        seen = [widths[0], *(2 * channels for channels in widths[1:])]
        self.encoder_att = nn.ModuleDict({task: nn.ModuleList(map(_attention, seen, widths)) for task in tasks})
        seen = [coming + own for coming, own in zip(widths, finer, strict=True)]
        self.decoder_att = nn.ModuleDict({task: nn.ModuleList(map(_attention, seen, finer)) for task in tasks})
        self.heads = nn.ModuleDict({task: head(width, channels) for task, channels in tasks.items()})
        draw_weights(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(N, in_channels, H, W)`, at least 32x32, to raw values `{task: (N, channels, H, W)}`."""
        encoder, decoder = self.trunk(x)
        return {task: head(self._attend(task, encoder, decoder)) for task, head in self.heads.items()}

    def _attend(self, task: str, encoder: Sequence[Stage], decoder: Sequence[Stage]) -> Tensor:
        """A task's features of the trunk: `(N, width, H, W)`."""
        encoder_masks, decoder_masks = (list(masks[task].children()) for masks in (self.encoder_att, self.decoder_att))
        seen = encoder[0].first
        for i, stage in enumerate(encoder):
            masked = encoder_masks[i](seen) * stage.last
            taken = F.max_pool2d(self.encoder_block_att[i](masked), 2)
            if i + 1 < STAGES:
                seen = torch.cat((encoder[i + 1].first, taken), dim=1)
        for i in reversed(range(STAGES)):
            stage = decoder[i]
            larger = F.interpolate(taken, size=stage.last.shape[-2:], mode="bilinear", align_corners=True)
            seen = torch.cat((stage.first, self.decoder_block_att[i](larger)), dim=1)
            taken = decoder_masks[i](seen) * stage.last
        return taken


def _attention(in_channels: int, out_channels: int) -> nn.Sequential:
    """A mask with values from 0 to 1, of two 1x1 convolutions."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, out_channels, 1),
            bn1=nn.BatchNorm2d(out_channels),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(out_channels, out_channels, 1),
            bn2=nn.BatchNorm2d(out_channels),
            sigmoid2=nn.Sigmoid(),
        )
    )
