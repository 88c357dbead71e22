"""The plan of a study: tasks x methods x seeds x grid, read from YAML and checked before any run starts."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..commands.options import import_report, plugin_flags
from ..commands.preprocess import task_flags
from ..data.lines import located, shown
from ..data.tasks import CORRELATIONS, RIGHT
from ..evaluation.metrics import METRICS
from . import recipe
from .attacked import Attack
from .recipe import Flag
from .rows import Draw, Source
from .values import Wrong, boolean, load, mapping, must_be, named, number, some_of, whole

KEYS = ("out", "work", "encoder", "train", "tasks", "methods", "seeds", "grid", "keep", "attack")
TASK_KEYS = ("data", "rows", "stratified", "flip", "evaluate", "metrics", "train", "transfer")
OURS = {  # flags that the study gives
    **{name: "name the encoder with encoder:" for name in ("restore-file", "finetune-from-model")},
    **{name: "say epochs: and warmup: (a share)" for name in ("max-update", "max-epoch", "total-num-update")},
    "epoch": "say epochs:",
    "warmup-updates": "say warmup:, the share of the updates",
    "seed": "list seeds:",
    **{name: "it follows from the task" for name in ("task", "num-classes", "regression-target", "init-token")},
    **{
        name: "the study gives it"
        for name in ("user-dir", "save-dir", "log-format", "log-interval", "valid-subset", "distributed-world-size")
    },
}


@dataclass(frozen=True)
class Task:
    """A data folder and the rows of it that are trained on.

    transfer: other folders on which its models are scored too, by name.
    """

    name: str
    source: Source
    draw: Draw
    metrics: tuple[str, ...]
    train: Mapping[str, Flag]
    transfer: Mapping[str, Source]

    @property
    def train_rows(self) -> int:
        return self.draw.rows or self.source.train_rows


def arm_of(method: str, variant: Mapping[str, Flag]) -> str:
    """A method with the grid's values, as reports name it."""
    return " ".join([method, *(f"{name}={value}" for name, value in variant.items())])


@dataclass(frozen=True)
class Asked:
    """One run that the plan asks for.

    variant: the grid's values; they are among the ``flags`` too.
    start: the checkpoint that it begins with; None for random weights.
    """

    task: Task
    method: str
    variant: Mapping[str, Flag]
    seed: int
    flags: Mapping[str, Flag]
    epochs: float
    warmup: float
    attack: Attack | None
    start: Path | None

    @property
    def arm(self) -> str:
        return arm_of(self.method, self.variant)

    @property
    def name(self) -> str:
        return "-".join([self.task.name, self.arm.replace(" ", "-").replace("/", "_"), f"seed{self.seed}"])

    @property
    def updates(self) -> int:
        per_epoch = math.ceil(self.task.train_rows / float(self.flags["batch-size"] or 1))
        return max(1, round(math.ceil(per_epoch / float(self.flags.get("update-freq") or 1)) * self.epochs))

    def settings(self) -> dict[str, Any]:
        """What the plan says about the run, for its line in runs.jsonl: no paths, no order of keys."""
        return {
            "task": self.task.name,
            "method": self.method,
            "variant": dict(self.variant),
            "seed": self.seed,
            "draw": asdict(self.task.draw),
            "flags": {name: self.flags[name] for name in sorted(self.flags)},
            "epochs": self.epochs,
            "warmup": self.warmup,
        }

    def beside(self) -> dict[str, Any]:
        """What is asked for beside the training, where something is: by it too a line is found again."""
        asked = {"attack": self.attack and asdict(self.attack), "transfer": sorted(self.task.transfer)}
        return {name: what for name, what in asked.items() if what}


# of the grid: tasks, methods, values by flag
Block = tuple[Sequence[str], Sequence[str], Mapping[str, Sequence[Flag]]]


@dataclass(frozen=True)
class Plan:
    """A whole study.

    starts: by method, the checkpoint that its runs begin with; None for random weights.
    encoder_flags: the architecture's.
    axes: the grid.
    attacks: by method and seed, what the run's weights are put under at its end; not of those that have none.
    """

    path: Path
    out: Path
    work: Path
    starts: Mapping[str, Path | None]
    encoder_flags: Sequence[str]
    train: Mapping[str, Flag]
    tasks: Sequence[Task]
    methods: Mapping[str, Mapping[str, Flag]]
    seeds: Sequence[int]
    axes: Sequence[Block]
    keep: bool
    attacks: Mapping[tuple[str, int], Attack]

    def runs(self) -> list[Asked]:
        """Every run; all with the first seed come first."""
        return [
            self._asked(task, method, variant, seed)
            for seed in self.seeds
            for task in self.tasks
            for method in self.methods
            for variant in self._variants(task.name, method)
        ]

    def _variants(self, task: str, method: str) -> Iterator[dict[str, Flag]]:
        axes: dict[str, Sequence[Flag]] = {}
        for tasks, methods, values in self.axes:
            if task in tasks and method in methods:
                axes.update(values)
        for values_chosen in itertools.product(*axes.values()):
            yield dict(zip(axes, values_chosen))

    def _asked(self, task: Task, method: str, variant: Mapping[str, Flag], seed: int) -> Asked:
        flags = {**recipe.COMMON, "warmup": recipe.WARMUP, **self.train, **task.train, **self.methods[method]}
        flags.update(variant)
        where = f"{task.name}, {method}: "
        must_be("epochs" in flags, where + "epochs", "not set", "a number above 0, as in train: {epochs: 3}")
        epochs, warmup = (number(name, flags.pop(name), 0) for name in ("epochs", "warmup"))
        must_be(epochs > 0, where + "epochs", epochs, "above 0, in train: or a method")
        must_be(warmup < 1, where + "warmup", warmup, "a share of the updates, from 0 to below 1")
        number(where + "batch-size", flags["batch-size"], 1)
        for name in ("criterion", "optimizer"):
            allowed = f"one of fairseq-train's, as in {name}: ...; {method} sets {', '.join(self.methods[method])}"
            must_be(name in flags, where + name, "not set", allowed)
        attack, start = self.attacks.get((method, seed)), self.starts[method]
        return Asked(task, method, variant, seed, flags, epochs, warmup, attack, start)

    def command(self, asked: Asked, data: Path) -> list[str]:
        """fairseq-train's arguments for a run on ``data``, all but --save-dir."""
        source = asked.task.source
        return [
            *(str(data), *plugin_flags(), *task_flags(source.task, source.bpe)),
            *(recipe.encoder_flags(asked.start) if asked.start else ()),
            *(*self.encoder_flags, *recipe.as_flags(asked.flags), "--seed", str(asked.seed)),
            *recipe.length_flags(asked.updates, asked.warmup, asked.flags.get("lr-scheduler")),
            # the weights once, at the end, where the worker scores them
            *("--disable-validation", "--no-epoch-checkpoints", "--no-save-optimizer-state"),
            *("--save-interval", "1000000", *recipe.ONE_DEVICE, *recipe.LOG),
        ]


def read_plan(path: Path, files: bool = True) -> Plan:
    """Read a plan. Raises `UsageError` with the key, its value and what is allowed.

    files: look at data and encoder too; a report needs neither.
    """
    try:
        return _plan(path, mapping("the plan", load(path), KEYS), files)
    except Wrong as error:
        raise located(path, str(error)) from None


def _plan(path: Path, given: Mapping[str, Any], files: bool) -> Plan:
    for key in ("out", "tasks", "methods", "seeds"):
        must_be(given.get(key), key, given.get(key), "given")
    methods, starts = _methods(given, files)
    tasks = [_task(name, value, files) for name, value in named(given, "tasks").items()]
    seeds = given["seeds"]
    right = isinstance(seeds, list) and len(set(map(str, seeds))) == len(seeds)
    must_be(right and all(type(s) is int and s >= 0 for s in seeds), "seeds", seeds, "a list of numbers, once each")
    checkpoint, encoder_flags = _encoder(given.get("encoder")) if files else (None, [])
    if checkpoint and (words := checkpoint.with_name("dict.txt")).is_file():  # an imported encoder's
        for task in tasks:
            what = f"{task.source.folder} has another dictionary than the encoder, {words}"
            if words.read_bytes() != task.source.words_in_order:
                raise Wrong(f"tasks.{task.name}: {what}; preprocess it with the encoder's --bpe-dir")
    plan = Plan(
        path=path,
        out=Path(str(given["out"])),
        work=Path(str(given.get("work") or Path(".cache") / "study" / path.stem)),
        starts={name: starts.get(name, checkpoint) for name in methods},
        encoder_flags=encoder_flags,
        train=_flags("train", given.get("train") or {}),
        tasks=tasks,
        methods=methods,
        seeds=seeds,
        axes=_axes(given.get("grid") or [], [task.name for task in tasks], list(methods)),
        keep=boolean("keep", given.get("keep", False)),
        attacks=_attacks(given.get("attack"), list(methods), seeds),
    )
    names = [asked.name for asked in plan.runs()]
    twice = next((name for name in names if names.count(name) > 1), None)
    must_be(twice is None, "run", twice, "named once; a grid value stands twice, or names run into each other")
    return plan


def _methods(given: Mapping[str, Any], files: bool) -> tuple[dict[str, dict[str, Flag]], dict[str, Path]]:
    """Each method's flags, and the checkpoints of those that have a ``from``."""
    methods, starts = {}, {}
    for name, value in named(given, "methods").items():
        flags = _flags(f"methods.{name}", value)
        if "from" in flags:
            start = starts[name] = Path(str(flags.pop("from")))
            must_be(not files or start.is_file(), f"methods.{name}: from", start, "an existing checkpoint")
        methods[name] = flags
    return methods, starts


def _flags(where: str, value: Any) -> dict[str, Flag]:
    found = mapping(where, value)
    for name, setting in found.items():
        if name in OURS:
            raise Wrong(f"{where}: {name} cannot be set; {OURS[name]}")
        must_be(not isinstance(setting, dict | list), f"{where}: {name}", setting, "one value (lists: grid)")
    return found


def _task(name: str, value: Any, files: bool) -> Task:
    where = f"tasks.{name}"
    given = mapping(where, value, TASK_KEYS)
    must_be(given.get("data"), f"{where}: data", given.get("data"), "a folder that preprocess wrote")
    source = Source(Path(str(given["data"])))
    flip = number(f"{where}: flip", given.get("flip", 0), 0)
    must_be(flip <= 1, f"{where}: flip", flip, "a share of the training labels, 0 to 1")
    draw = Draw(
        rows=whole(f"{where}: rows", given.get("rows")),
        stratified=boolean(f"{where}: stratified", given.get("stratified", False)),
        flip=flip,
        evaluate=whole(f"{where}: evaluate", given.get("evaluate"), 2),  # half of the rows fits a temperature
    )
    flags = _flags(f"{where}.train", given.get("train") or {})
    others = named(given, "transfer", where)
    transfer = {other: Source(Path(str(folder))) for other, folder in others.items()}
    if not files:
        return Task(name, source, draw, (), flags, transfer)
    source.check()
    most = source.train_rows
    must_be((draw.rows or 1) <= most, f"{where}: rows", draw.rows, f"at most {most}, what {source.folder} has")
    for key in ("flip", "stratified") if source.regression else ():
        must_be(not getattr(draw, key), f"{where}: {key}", given.get(key), "left out: the task has no classes")
    for other, there in transfer.items():
        there.check(train=False)
        for what in ("inputs", "classes", "words_in_order"):
            if getattr(there, what) != getattr(source, what):
                words = {"inputs": "texts in a row", "words_in_order": "dictionary"}.get(what, what)
                raise Wrong(f"{where}: transfer: {other}: {there.folder} has other {words} than {source.folder}")
    return Task(name, source, draw, _metrics(where, given.get("metrics"), source), flags, transfer)


def _attacks(given: Any, methods: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], Attack]:
    """By method and seed the runs that are attacked: all that the key ``attack`` does not leave out."""
    if given is None:
        return {}
    found = mapping("attack", given, ("radii", "rows", "methods", "seeds"))
    radii, rows = found.get("radii"), whole("attack: rows", found.get("rows", 256))
    right = isinstance(radii, list) and bool(radii) and all(type(r) in (float, int) and 0 < r <= 1 for r in radii)
    right = right and sorted(set(radii or [])) == radii
    must_be(right, "attack: radii", radii, "a list of rising shares, above 0 and up to 1")
    attacked_methods = some_of("attack: methods", found.get("methods", list(methods)), methods)
    attacked_seeds = some_of("attack: seeds", found.get("seeds", list(seeds)), seeds)
    asked = Attack(list(map(float, radii or [])), rows or 0)
    return dict.fromkeys(itertools.product(attacked_methods, attacked_seeds), asked)


def _metrics(where: str, given: Any, source: Source) -> tuple[str, ...]:
    """Those that the plan names; else those of the task that the folder was made from."""
    allowed = [name for name in METRICS if name != "top1" and (name in CORRELATIONS) == source.regression]
    if RIGHT not in source.classes:  # whose F1 it is
        allowed = [name for name in allowed if not name.endswith("f1")]
    if given is None:
        return source.task.metrics
    return tuple(some_of(f"{where}: metrics", given, allowed))


def _encoder(given: Any) -> tuple[Path | None, list[str]]:
    """(checkpoint, the architecture's flags)."""
    if isinstance(given, str):
        folder = Path(given)
        try:
            return folder / "model.pt", import_report(folder)["flags"]
        except (ValueError, KeyError):
            allowed = "a folder that import-hf wrote, or checkpoint: and flags:"
            raise Wrong(f"encoder is {shown(given)}; it must be {allowed}") from None
    found = mapping("encoder", given, ("checkpoint", "flags"))
    flags = recipe.as_flags(_flags("encoder.flags", found.get("flags") or {}))
    checkpoint = Path(str(found["checkpoint"])) if found.get("checkpoint") else None
    must_be(checkpoint is None or checkpoint.is_file(), "encoder: checkpoint", checkpoint, "an existing file")
    return checkpoint, flags


def _axes(given: Any, tasks: Sequence[str], methods: Sequence[str]) -> list[Block]:
    """The grid's blocks; one that names no tasks or methods is for all."""
    found: list[Block] = []
    seen: set[tuple[str, str, str]] = set()
    for block in given if isinstance(given, list) else [given]:
        block = mapping("grid", block)
        for_tasks, for_methods = (
            some_of(f"grid: {key}", block.pop(key, list(allowed)), allowed)
            for key, allowed in (("tasks", tasks), ("methods", methods))
        )
        for name, values in block.items():
            must_be(isinstance(values, list) and values, f"grid: {name}", values, "a list of values")
            must_be(len(set(map(str, values))) == len(values), f"grid: {name}", values, "different values")
            for value in values:
                _flags("grid", {name: value})
            for place in itertools.product([name], for_tasks, for_methods):
                must_be(place not in seen, "grid", name, "in one block for the same task and method")
                seen.add(place)
        found.append((for_tasks, for_methods, block))
    return found
