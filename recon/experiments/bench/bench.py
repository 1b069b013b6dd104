"""Bench: one profile, then every run that is missing, and the training steps timed. Imports torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recon import branching, methods, profiling
from recon.errors import MapFileError, PlanError, UsageError
from recon.experiments.bench.job import Job, run_folder, train, weight
from recon.experiments.bench.runs import BenchRuns
from recon.experiments.bench.settings import BenchSettings, device_of
from recon.experiments.bench.variants import Variant, in_turn_or_parallel, time_steps
from recon.experiments.inputs import example_inputs, make_loaders, make_model
from recon.experiments.optimizers import make_optimizer
from recon.experiments.run import SINGLE_TASK, Run, versions
from recon.experiments.training.run_folder import epoch_line
from recon.experiments.training.training import silent
from recon.maps import ConflictMap
from recon.methods import FeatureMethod
from recon.plans import Match, Selection, choose, match, plan
from recon.problems.problem import Problem
from recon.profiling.preflight import refuse_unprofilable
from recon.support.files.documents import json_values, read_document, shown
from recon.support.files.whole import write_text
from recon.support.network.layer_choice import choose_layers
from recon.training.checkpoints import checkpoint_beside

MAP_FILE, RESULTS_FILE = "map.json", "results.json"
FORMAT, VERSION = "recon bench", 1
_TRANSFERRED = "--map of another data set"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The runs of one problem, in one folder.

    Args:
        settings: what the runs have in common.
        folder: where they go.
        methods: gradient methods, each plain and branched.
        seeds: how often everything is trained.
        top_k: how many layers are branched; half of the shared ones if None.
        max_macs: the budget of the budgeted plan; None for no such plan.
        controls: which methods train the random and the budgeted plan: `joint`, `all` or `none`.
        count_controls: whether conflicts are counted while those train.
        given: a map and its fingerprint: in place of the profile where it was made on the same
            problem, else beside it, as Recon*.
        rename: of the given map's layers.
        workers: how many trainings run at the same time.
        rounds: how often each training step is timed.
        tell: called with a line of text whenever a step of the bench is done.
        progress: whether a bar on stderr shows how far an epoch of the profile is.
    """

    settings: BenchSettings
    folder: Path
    methods: tuple[str, ...]
    seeds: int
    top_k: int | None = None
    max_macs: float | None = None
    controls: str = "joint"
    count_controls: bool = True
    given: tuple[ConflictMap, str] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    rounds: int = 15
    tell: Callable[[str], None] = silent
    progress: bool = False

    @cached_property
    def problem(self) -> Problem:
        """What is trained."""
        return self.settings.problem()

    @property
    def transfers(self) -> bool:
        """Whether the given map is another data set's."""
        return self.given is not None and self.given[0].made_by.get("problem") != self.problem.name

    def run(self) -> BenchRuns:
        """Profile, train what is missing, time.

        Raises:
            UsageError: the folder has a bench of other settings, or a map or K does not fit the model.
        """
        earlier = self._earlier()
        self._check_layers()
        write_text(self.folder / RESULTS_FILE, json.dumps({**self._document(), **earlier}, indent=1) + "\n")
        cmap = self._map()
        top_k = self.top_k or max(1, len(cmap.layers) // 2)
        variants, notes = self._variants(cmap, top_k)
        runs = self._train(variants)
        seconds = earlier.get("seconds_per_step", {})
        if {variant.label for variant in variants} - seconds.keys():
            self.tell("Timing the training steps of all, in turn")
            warm_up = min(3, self.rounds // 3)
            seconds = time_steps(self.problem, variants, device_of(self.settings), self.rounds, warm_up)
        return BenchRuns(self.folder, cmap, top_k, variants, notes, runs, seconds)

    def save(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Write the results file; gives what is in it."""
        settings = {**self._earlier()["settings"], **self._document()["settings"]}
        document = json_values({**self._document(), "settings": settings, **found, "finished": True})
        write_text(self.folder / RESULTS_FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")
        return dict(document)

    def _document(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.given is not None:
            given = {_TRANSFERRED if self.transfers else "--map": [self.given[1], dict(self.rename)]}
        return {
            "format": FORMAT,
            "version": VERSION,
            "problem": self.problem.name,
            "settings": {**self.settings.as_dict(), "parameters": self._size, **given},
            "versions": versions(),
            "finished": False,
        }

    @cached_property
    def _size(self) -> int:
        # A user's file may make another network than when the runs in the folder were trained.
        return sum(parameter.numel() for parameter in make_model(self.problem, 0).parameters())

    def _earlier(self) -> dict[str, Any]:
        """What an earlier command measured that stays true: step times. More methods and seeds may be added to it."""
        path = self.folder / RESULTS_FILE
        if not path.exists():
            return {}
        found = read_document(
            path, UsageError, "It is damaged, or not a results file of a bench. Choose another folder."
        )
        found.check_format(FORMAT, VERSION)
        had = found.get("settings", dict)
        asked = self._document()["settings"]
        # Another data set's map may join the runs that are there, and be left out again.
        joined = asked.get(_TRANSFERRED) or had.get(_TRANSFERRED)
        asked, had = ({**one, _TRANSFERRED: one.get(_TRANSFERRED) or joined} for one in (asked, had))
        other = [
            f"{name} was {shown(had.get(name))}, not {shown(asked.get(name))}"
            for name in {**asked, **had}
            if had.get(name) != asked.get(name)
        ]
        if other:
            raise UsageError(
                f"{self.folder} holds a bench with other settings: {'; '.join(other)}. Use those settings, or choose "
                "another folder."
            )
        seconds: dict[str, float] = {}
        if "seconds_per_step" in found:
            timed = found.table("seconds_per_step")
            seconds = {label: timed.number(label, least=0) for label in timed}
        return {"settings": asked, "seconds_per_step": seconds}

    def _check_layers(self) -> None:
        """Refuse before the profile what can be refused by then."""
        model = make_model(self.problem, 0)
        layers = len(choose_layers(model, **self.settings.choice))
        if (self.top_k or 0) > layers:
            counted = " that the profile counts in" * bool(self.settings.choice)
            raise UsageError(
                f"K is {self.top_k}, but {type(model).__name__} has only {layers} layers{counted}. Choose a smaller K."
            )
        if self.given is not None:
            self._match_given(model)

    def _match_given(self, model: Any) -> Match:
        assert self.given is not None
        return match(self.given[0], model, self.rename)

    def _map(self) -> ConflictMap:
        """The problem's own map: given, profiled earlier, or profiled now."""
        if self.given is not None and not self.transfers:
            return self._match_given(make_model(self.problem, 0)).cmap
        path = self.folder / MAP_FILE
        try:
            cmap = ConflictMap.load(path)
        except MapFileError:
            if path.exists():
                raise
            cmap = self._profile(checkpoint_beside(path))
            cmap.save(path)
        checkpoint_beside(path).unlink(missing_ok=True)
        return cmap

    def _profile(self, checkpoint: Path) -> ConflictMap:
        settings, problem = self.settings, self.problem
        self.tell(f"Profiling {problem.name}: {settings.profile_epochs} epoch(s) of joint training")
        model = make_model(problem, 0).to(device_of(settings))
        loader, _ = make_loaders(problem, 0)
        refuse_unprofilable(
            model,
            loader,
            problem.losses,
            settings.recipe.accumulate,
            layers=settings.layers,
            exclude=settings.exclude,
            units=settings.units,
        )
        return profiling.profile(
            model,
            loader,
            problem.losses,
            optimizer=make_optimizer(problem, model, replace(settings.recipe, schedule=None)),
            epochs=settings.profile_epochs,
            threshold=settings.threshold,
            accumulate=settings.recipe.accumulate,
            layers=settings.layers,
            exclude=settings.exclude,
            units=settings.units,
            made_by={"problem": problem.name, "backbone": type(model).__name__, "seed": 0, "device": settings.device},
            on_epoch=lambda epoch: self.tell(epoch_line(epoch, settings.profile_epochs)),
            progress=self.progress,
            checkpoint=checkpoint,
            resume=True,
            settings=settings.as_dict(),
        )

    def _variants(self, cmap: ConflictMap, k: int) -> tuple[list[Variant], list[str]]:
        """What is trained, in the order of the table; and what is left out, and why."""
        problem, seeds = self.problem, range(self.seeds)
        model = make_model(problem, 0)
        found, tasks, notes = match(cmap, model), problem.task_names, []

        def chosen(found: Match, **how: Any) -> branching.BranchPlan:
            return choose(found, model, Selection(**how), tasks).plan

        # Every seed has the same plan, except the random one.
        recon = {f"Recon K={k}": (chosen(found, top_k=k),) * self.seeds}
        if self.transfers:
            recon[f"Recon* K={k}"] = (chosen(self._match_given(model), top_k=k),) * self.seeds
        controls: dict[str, tuple[branching.BranchPlan, ...]] = {}
        if self.controls != "none":
            controls[f"random K={k}"] = tuple(chosen(found, top_k=k, select="random", seed=seed) for seed in seeds)
        if self.controls != "none" and self.max_macs is not None:
            try:
                example = example_inputs(problem, 0)
                budgeted = plan(found, model, example, max_macs=self.max_macs, tasks=tasks)
                controls[f"max_macs={self.max_macs:g}"] = (budgeted,) * self.seeds
            except PlanError as error:
                notes.append(f"No budgeted plan: {error}")
        variants = [Variant(SINGLE_TASK)]
        for method in self.methods:
            counted = not isinstance(methods.parse(method), FeatureMethod)
            mine = {**recon, **(controls if self.controls == "all" or method == "joint" else {})}
            variants.append(Variant(method, counted=counted))
            variants += [
                Variant(method, surgery, of_seed, counted and (self.count_controls or surgery not in controls))
                for surgery, of_seed in mine.items()
            ]
        return variants, notes

    def _train(self, variants: Sequence[Variant]) -> dict[str, list[Run]]:
        jobs = [
            Job(self.settings, v, seed, run_folder(self.folder, v.label, seed))
            for seed in range(self.seeds)
            for v in variants
        ]
        missing = [job for job in jobs if job.finished() is None]
        if len(missing) < len(jobs):
            self.tell(f"{len(jobs) - len(missing)} of {len(jobs)} runs are finished already")
        # The long ones first: the last to be begun should not be the last to end.
        missing.sort(key=lambda job: (job.seed, -weight(job.variant, len(self.problem.tasks))))
        start = time.perf_counter()
        for number, (job, run) in enumerate(in_turn_or_parallel(train, missing, self.workers), start=1):
            minutes = (time.perf_counter() - start) / 60
            self.tell(f"Trained {number} of {len(missing)} ({minutes:.1f} min): {run.label}, seed {job.seed}")
        done: dict[str, list[Run]] = {variant.label: [] for variant in variants}
        for job in jobs:
            finished = job.finished()
            assert finished is not None
            done[job.variant.label].append(finished)
        return done
