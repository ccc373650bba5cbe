"""KNN-SSD's offline search: the sub-layers to skip for each task, and the prompts it is known by.

Bayesian optimisation by optuna over 2N numbers in [0, 1], of which those above 0.5 skip their
sub-layer; k-means by scikit-learn over the prompts' mean rows. What is maximised are tokens per
layer time where rows are free, by greedy self-speculation in one process: counted, not timed, so a
search on a busy machine finds the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppsd.engine.build import RunningPipeline
from ppsd.engine.llm import LLM
from ppsd.errors import PpsdError
from ppsd.lab.rivals.chain import LocalChain
from ppsd.lab.rivals.decoders import Ends, Skipping, Text, begin, decode
from ppsd.lab.rivals.skips import SkipSets
from ppsd.lab.rivals.stage import RivalStage
from ppsd.lab.rivals.timers import VirtualTimer
from ppsd.measure.workload import Task
from ppsd.model.stage import Stage
from ppsd.model.weights import open_source

MISSING = "the search needs optuna and scikit-learn; install them by `pip install 'ppsd-llm[lab]'`"
SEED = 0
EVERY = (2, 3, 4, 6, 8)  # skip one layer in so many: what a search begins with


@dataclass(frozen=True)
class Budget:
    """How much a search may try: ``evaluations`` of ``prompts`` × ``tokens`` for each task."""

    evaluations: int
    prompts: int
    tokens: int
    centres: int


class Trials:
    """Evaluations by task in a file of JSON lines, so that a search goes on where it stopped.

    The first line holds the search's settings. Raises PpsdError for a file of other settings, or
    one that cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.found: dict[str, list[tuple[tuple[int, ...], float]]] = defaultdict(list)
        try:
            text = path.read_text() if path.exists() else ""
            whole = text[: text.rfind("\n") + 1]
            if whole != text:  # a kill has cut the last line off
                path.write_text(whole)
            head, *rest = [json.loads(line) for line in whole.splitlines()] or [None]
            for record in rest:
                self.found[record["task"]].append((tuple(record["skip"]), record["score"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise PpsdError(f"{path} holds no evaluations ({error!r})") from error
        if head is None:
            self._write(settings, "w")
        elif head != json.loads(json.dumps(settings)):
            raise PpsdError(f"{path} holds evaluations of other settings")

    def add(self, task: str, skip: tuple[int, ...], score: float) -> None:
        """Keep an evaluation, on disk before this returns."""
        self.found[task].append((skip, score))
        self._write({"task": task, "skip": skip, "score": score})

    def _write(self, record: Mapping[str, Any], mode: str = "a") -> None:
        try:
            with self._path.open(mode) as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PpsdError(f"cannot write {self._path}: {error.strerror}") from error


def by_task(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """Return prompts by their category, which is their task."""
    groups: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[task.category].append(task)
    return dict(groups)


class Searcher:
    """Evaluates skip sets on a model that is in one process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        layout = llm.layout
        self._layers = layout.spec.num_layers
        self._source = open_source(layout.files.path)
        self._ends = frozenset(layout.spec.eos_ids)

    def mean_rows(self, tasks: Sequence[Task]) -> np.ndarray[Any, Any]:
        """Return the mean of the last layer's rows of each prompt [n, C], as unit vectors."""

        def run(running: RunningPipeline) -> list[np.ndarray[Any, Any]]:
            chain, drafting = self._chain(running.models[0]), Skipping(self._layers, None)
            texts = (self._begin(chain, drafting, task) for task in tasks)
            return [text.mean.float().cpu().numpy() for text in texts]

        rows = np.stack(self._llm.on_pipeline(run))
        unit: np.ndarray[Any, Any] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    def evaluator(self, tasks: Sequence[Task], tokens: int) -> Callable[[tuple[int, ...]], float]:
        """Return what gives a skip set's tokens per layer time over some prompts.

        Each prompt is run once and then kept, in a cache of its own.
        """
        drafting, ends = Skipping(self._layers, None), Ends(tokens, self._ends)

        def run(running: RunningPipeline) -> list[tuple[LocalChain, Text]]:
            chains = [self._chain(running.models[0]) for _ in tasks]
            pairs = zip(chains, tasks, strict=True)
            return [(chain, self._begin(chain, drafting, task)) for chain, task in pairs]

        texts: list[tuple[LocalChain, Text]] = self._llm.on_pipeline(run)

        def evaluate(skip: tuple[int, ...]) -> float:
            drafting.skip = skip
            found = self._llm.on_pipeline(
                lambda _: [decode(chain, drafting, text, ends) for chain, text in texts]
            )
            layers = sum(made.seconds for made in found)
            return sum(len(made.tokens) - 1 for made in found) / layers if layers else 0.0

        return evaluate

    def _begin(self, chain: LocalChain, drafting: Skipping, task: Task) -> Text:
        ids = self._llm.encode(task.messages)
        return begin(chain, drafting, ids, self._llm.config.prefill_chunk)

    def _chain(self, model: Stage) -> LocalChain:
        """Return the model as one stage, on a clock that counts layer times."""
        layers = self._layers + self._llm.layout.spec.head_parameters / (
            self._llm.layout.spec.layer_parameters
        )
        given = model, self._source, self._llm.layout.identity
        return LocalChain([RivalStage(*given, VirtualTimer(), layers)], virtual=True)


def best_skip(
    layers: int,
    evaluate: Callable[[tuple[int, ...]], float],
    count: int,
    known: Sequence[tuple[tuple[int, ...], float]],
    note: Callable[[tuple[int, ...], float], object],
) -> tuple[int, ...]:
    """Return the best of ``count`` skip sets, of which ``known`` ones have been evaluated."""
    optuna = _optuna()
    sampler = optuna.samplers.TPESampler(seed=SEED + len(known))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    spaces = {str(i): optuna.distributions.FloatDistribution(0.0, 1.0) for i in range(2 * layers)}
    for skip, score in known:
        values = {name: 0.75 if int(name) in skip else 0.25 for name in spaces}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=spaces, value=score))
    for every in EVERY[len(known) :]:
        skipped = {2 * i + half for i in range(1, layers, every) for half in (0, 1)}
        study.enqueue_trial({name: 0.75 if int(name) in skipped else 0.25 for name in spaces})
    for _ in range(len(known), count):
        trial = study.ask(spaces)
        skip = tuple(int(name) for name, value in trial.params.items() if value > 0.5)
        score = evaluate(skip)
        study.tell(trial, score)
        note(skip, score)
    best = study.best_trial.params
    return tuple(int(name) for name, value in best.items() if value > 0.5)


def centres_of(rows: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Return the k-means centres of unit vectors [n, C], as unit vectors."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise PpsdError(MISSING) from error
    found = KMeans(min(count, len(rows)), random_state=SEED, n_init=4).fit(rows).cluster_centers_
    unit: np.ndarray[Any, Any] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return unit.astype(np.float32)


def search(
    llm: LLM,
    tasks: Sequence[Task],
    budget: Budget,
    trials: Trials,
    done: Callable[[str], object],
) -> SkipSets:
    """Return skip sets and centres of every task; ``done`` is called for every step."""
    _optuna()
    searcher, groups = Searcher(llm), by_task(tasks)
    skips, owners, centres = {}, [], []
    for task, prompts in groups.items():
        chosen = [prompts[i * len(prompts) // budget.prompts] for i in range(budget.prompts)]
        known = trials.found[task]

        def note(skip: tuple[int, ...], score: float, task: str = task) -> None:
            trials.add(task, skip, score)
            done(f"{task} · {score:.3f}")

        evaluate = searcher.evaluator(chosen, budget.tokens)
        layers = llm.layout.spec.num_layers
        skips[task] = best_skip(layers, evaluate, budget.evaluations, list(known), note)
        own = centres_of(searcher.mean_rows(prompts), budget.centres)
        owners += [task] * len(own)
        centres.append(own)
    about = {
        **vars(budget),
        "objective": "tokens per layer time",
        "samples": {task: len(prompts) for task, prompts in groups.items()},
        "scores": {task: max(score for _, score in trials.found[task]) for task in groups},
    }
    return SkipSets(llm.layout.identity.fingerprint, skips, owners, np.concatenate(centres), about)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise PpsdError(MISSING) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
