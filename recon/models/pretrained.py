"""ImageNet weights for the trunk of a backbone, from one of torchvision's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from recon.errors import CheckpointError, shortened
from recon.support.files.weights import read_state_dict


def load_pretrained(
    model: nn.Module, path: str | Path, network: str, *, unused: tuple[str, ...], fresh: tuple[str, ...]
) -> None:
    """Load a network of torchvision into the layers of `model` that have its names; the others keep their weights.

    The file must hold the whole trunk and nothing else: a ResNet-34 has every layer of a ResNet-18, but a ResNet-18
    gains little from its weights. It is a state dict as torchvision publishes it (`resnet18-f37072fd.pth`, say), or as
    `torch.save` wrote it. `unused` are beginnings of names in the file that the model does not need, such as "fc.";
    `fresh` those of names in the model that the file cannot have, such as "heads.".
    """
    given = _named(read_state_dict(Path(path)), without=unused)
    wanted = _named(model.state_dict(), without=fresh)
    odd = [name for name in {**wanted, **given} if not _alike(wanted.get(name), given.get(name))]
    if odd:
        raise CheckpointError(
            f"{path} does not hold the weights of a {network}: {len(odd)} of its and the model's "
            f"{len({**wanted, **given})} tensors have no partner of the same name and shape ({shortened(odd)}). "
            f"Pass a state dict of torchvision.models.{network}(), such as the file that "
            f"torchvision.models.{network}(weights='DEFAULT') downloads."
        )
    model.load_state_dict(given, strict=False)


def _named(state: Mapping[str, Tensor], without: tuple[str, ...]) -> dict[str, Tensor]:
    # Torchvision's older files do not count batches, and a norm with a fixed momentum does not use the count.
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(without) and not name.endswith("num_batches_tracked")
    }


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape
