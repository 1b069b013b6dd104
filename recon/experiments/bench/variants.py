"""Variants of one problem, trained several at a time, timed in turn. Imports torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import TypeVar

import torch
from torch import nn

from recon import branching
from recon.experiments.costs import TrainingStep
from recon.experiments.inputs import few_samples, first_batch, make_loaders, make_model
from recon.experiments.run import SINGLE_TASK
from recon.problems.problem import Problem
from recon.support.network.forward import Part
from recon.support.timing import step_seconds

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Variant:
    """One way to train: a method, on the plain model or on a branched one.

    Args:
        method: a gradient method, or `SINGLE_TASK`.
        surgery: how its layers were chosen; empty for the plain model.
        plans: of each seed; empty for the plain model.
        counted: whether conflicts are counted while it trains.
    """

    method: str
    surgery: str = ""
    plans: tuple[branching.BranchPlan, ...] = ()
    counted: bool = False

    @property
    def label(self) -> str:
        """What tables and records call it."""
        return f"{self.method} + {self.surgery}" if self.surgery else self.method

    @property
    def is_single_task(self) -> bool:
        """Whether it trains one model for each task."""
        return self.method == SINGLE_TASK

    def model(self, problem: Problem, seed: int, device: torch.device) -> nn.Module:
        """A fresh model of the variant, branched if it has plans."""
        model = make_model(problem, seed).to(device)
        return branched(problem, model, self.plans[seed]) if self.plans else model


def branched(problem: Problem, model: nn.Module, plan: branching.BranchPlan) -> nn.Module:
    """The model, branched by the plan."""
    device = next(model.parameters()).device
    return branching.convert(model, plan, few_samples(_batch(problem, device)[0].inputs)[0])


def in_turn_or_parallel(
    train: Callable[[Job], Outcome], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Outcome]]:
    """Each job's outcome, as they come: of jobs that begin in this order, `workers` at a time, each on one thread.

    The jobs are independent, so the workers change nothing but time. `train` and the jobs can be pickled; a single
    worker runs right here.
    """
    if workers == 1:
        yield from ((job, train(job)) for job in jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker) as pool:
        futures = {pool.submit(train, job): job for job in jobs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would train on, in a folder that the next command goes on with.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def default_workers(device: torch.device) -> int:
    """One training a core, four at the most; one alone on a GPU."""
    return 1 if device.type == "cuda" else min(4, os.cpu_count() or 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread."""
    # For a small network, a second thread saves a fifth of the time; but where the other core is busy, waiting for it
    # costs many times that.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def time_steps(
    problem: Problem, variants: Sequence[Variant], device: torch.device, rounds: int = 15, warm_up: int = 3
) -> dict[str, float]:
    """Seconds of a training step of each variant by its label, in turn; for single-task training, one of each model."""
    batch = _batch(problem, device)
    return step_seconds({v.label: _step(problem, v, batch, device) for v in variants}, rounds, warm_up)


def _step(problem: Problem, variant: Variant, batch: Sequence[Part], device: torch.device) -> Callable[[], None]:
    if not variant.is_single_task:
        return TrainingStep(problem, variant.model(problem, 0, device), batch, variant.method)
    alone = [
        TrainingStep(problem, variant.model(problem, 0, device), batch, tasks=[task]) for task in problem.task_names
    ]

    def one_of_each() -> None:
        for step in alone:
            step()

    return one_of_each


def _batch(problem: Problem, device: torch.device) -> list[Part]:
    train, _ = make_loaders(problem, 0)
    return first_batch(problem, train, device)
