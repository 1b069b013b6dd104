"""SegNet for several tasks: one encoder-decoder with max-unpooling, and a small head for each task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = 5


class Stage(NamedTuple):
    """A stage's features, all of one height and width."""

    first: Tensor
    """Encoder: the output of the stage's first convolution. Decoder: the stage's input, unpooled."""
    last: Tensor
    """The output of its last convolution."""


class SegNetTrunk(nn.Module):
    """The encoder and the decoder of SegNet (Badrinarayanan, Kendall, Cipolla, TPAMI 2017).

    The encoder is VGG-16's: five stages of 2, 2, 3, 3 and 3 convolutions, each with batch norm and ReLU, and
    max-pooling after each stage; they have 1, 2, 4, 8 and 8 times `width` channels. The decoder mirrors it; it puts
    each value back where the encoder's pooling found its maximum. Layers are named as in the code of Liu, Johns and
    Davison (CVPR 2019), whose multi-task form this is, and within a block as in Recon's published conflict scores: a
    stage's first convolution lies in `encoder_block` or `decoder_block`, the others in `conv_block_enc` or
    `conv_block_dec`, and decoder stages have the number of the encoder stage that they mirror.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        widths = stage_widths(width)
        into, out_of = [in_channels, *widths[:-1]], [widths[0], *widths[:-1]]
        self.encoder_block = nn.ModuleList(map(conv_block, into, widths))
        self.conv_block_enc = nn.ModuleList(map(_more_convolutions, range(STAGES), widths))
        self.decoder_block = nn.ModuleList(map(conv_block, widths, out_of))
        self.conv_block_dec = nn.ModuleList(map(_more_convolutions, range(STAGES), out_of))

    def trunk(self, x: Tensor) -> tuple[list[Stage], list[Stage]]:
        """Images `(N, in_channels, H, W)` to the stages of the encoder and of the decoder, the finest first.

        Stage `i` has `H / 2^i` rows and `W / 2^i` columns, rounded down; the smallest images are 32x32.
        """
        encoder, pooled_at = [], []
        for first_block, more in zip(self.encoder_block, self.conv_block_enc, strict=True):
            first = first_block(x)
            last = more(first)
            encoder.append(Stage(first, last))
            x, indices = F.max_pool2d(last, 2, return_indices=True)
            pooled_at.append(indices)
        decoder = []
        for i in reversed(range(STAGES)):
            unpooled = F.max_unpool2d(x, pooled_at[i], (2, 2), output_size=encoder[i].last.shape[-2:])
            x = self.conv_block_dec[i](self.decoder_block[i](unpooled))
            decoder.append(Stage(unpooled, x))
        return encoder, decoder[::-1]


class SegNet(SegNetTrunk):
    """SegNet with a head of two convolutions for each task: "split, standard" of Liu, Johns and Davison.

    "End-to-End Multi-Task Learning with Attention" (CVPR 2019, arXiv 1803.10704), section 4.1. It is the network that
    Recon (Shi et al., ICLR 2023) trains on Cityscapes.

    Args:
        tasks: `{task name: channels of its output}`.
        in_channels: channels of the input image.
        width: channels of the first stage; 64 in the papers.
    """

    def __init__(self, tasks: Mapping[str, int], in_channels: int = 3, width: int = 64) -> None:
        super().__init__(in_channels, width)
        self.heads = nn.ModuleDict({task: head(width, channels) for task, channels in tasks.items()})
        draw_weights(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images `(N, in_channels, H, W)`, at least 32x32, to raw values `{task: (N, channels, H, W)}`."""
        _, decoder = self.trunk(x)
        return {task: head(decoder[0].last) for task, head in self.heads.items()}


def stage_widths(width: int) -> list[int]:
    """The channels of the five stages."""
    return [width, 2 * width, 4 * width, 8 * width, 8 * width]


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution, batch norm and ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, out_channels, 3, padding=1),
            bn1=nn.BatchNorm2d(out_channels),
            relu1=nn.ReLU(inplace=True),
        )
    )


def head(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution and a 1x1 one, with nothing in between, as in the papers' code."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, in_channels, 3, padding=1), conv2=nn.Conv2d(in_channels, out_channels, 1)
        )
    )


def draw_weights(model: nn.Module) -> None:
    """Normal Xavier weights (Glorot and Bengio, AISTATS 2010) and zero biases for convolutions, as in the papers' code.

    Batch norms start at 1 and 0 there too, as in PyTorch.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _more_convolutions(stage: int, channels: int) -> nn.Sequential:
    if stage < 2:  # VGG-16's first two stages have two convolutions
        return conv_block(channels, channels)
    return nn.Sequential(conv_block(channels, channels), conv_block(channels, channels))
