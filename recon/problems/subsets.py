"""Problems that make do with some of their training samples."""

from __future__ import annotations

from recon.errors import UsageError


def check_train_samples(name: str, train_samples: int | None, batch: int) -> None:
    """See that they fill a batch.

    Raises:
        UsageError: they do not.
    """
    if train_samples is not None and train_samples < batch:
        raise UsageError(
            f"{name} trains on batches of {batch} samples, so {train_samples} training samples are too few. Take at "
            f"least {batch}."
        )


def check_available(name: str, available: int, train_samples: int | None) -> None:
    """See that there are so many.

    Raises:
        UsageError: there are not.
    """
    if train_samples is not None and train_samples > available:
        raise UsageError(f"There are {available} training samples of {name}, not {train_samples}. Ask for fewer.")
