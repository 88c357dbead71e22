"""What several tests share: tolerances, tiny data, tiny models, fairseq's programs in this process."""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import pickle
import random
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fairseq import optim, options, tasks
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules import gelu as fairseq_gelu
from fairseq.utils import apply_to_sample
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import smart_fairseq
from smart_fairseq.errors import UsageError
from smart_fairseq.terms import TermValue

ROOT = Path(__file__).resolve().parent.parent
USER_DIR = str(Path(smart_fairseq.__file__).parent)

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 1e-2, "atol": 1e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
}
# where models and batches are; "cuda" by `make test-gpu`
DEVICE = os.environ.get("SMART_TEST_DEVICE", "cpu")

# where runs go that save nothing; fairseq makes a file there and removes it, so no two processes may share one
NOT_SAVED = tempfile.TemporaryDirectory(prefix="not-saved-")

HALF_TYPES = [torch.float16, torch.bfloat16]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, **overrides: float) -> None:
    """Equal within the tolerance of the coarser of the two dtypes; `assert_equal` is the exact word."""
    dtype = min(actual.dtype, expected.dtype, key=lambda d: torch.finfo(d).bits)
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), **{**TOLERANCE[dtype], **overrides})


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0)


TINY_MODEL = [
    *("--arch", "roberta", "--encoder-layers", "2", "--encoder-embed-dim", "16"),
    *("--encoder-ffn-embed-dim", "32", "--encoder-attention-heads", "2", "--max-positions", "32"),
]
# a term that is large enough to be seen
BOLD = ["--smart-epsilon", "1e-2", "--smart-step-size", "1e-1", "--smart-noise-std", "1e-3"]
NO_DROPOUT = ["--dropout", "0", "--attention-dropout", "0", "--pooler-dropout", "0"]
# layers as wide as in RoBERTa in relation to each other, and many, so that the ends do not count
LIKE_ROBERTA = ["--encoder-layers", "8", "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "256"]
# float16 as a CPU can train it, and a loss scale at which tiny models do not overflow
HALF = ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"]
# the same examples in the same order, and an epsilon of Adam's that does not blow rounding up
STEADY = [*NO_DROPOUT, "--curriculum", "9", "--required-batch-size-multiple", "1", "--adam-eps", "1e-4"]
STEADY += ["--ddp-backend", "legacy_ddp"]
FIXED = [*STEADY, *BOLD]
HEAD = "sentence_classification_head"


class Regularised(NamedTuple):
    """A way to train with one of the package's criteria.

    flags: with which every term is large enough to be seen.
    off: flags that switch off the criterion's own terms.
    terms: their names.
    still: those of them that act without dropout.
    in_half: flags with which half precision resolves the terms.
    """

    criterion: str
    flags: list[str]
    off: list[str]
    terms: list[str]
    still: list[str]
    in_half: list[str]


def _smart(*flags: str, half: str = "5e-2") -> Regularised:
    off, in_half = ["--smart-weight", "0"], ["--smart-epsilon", half]
    return Regularised("smart_sentence_prediction", [*BOLD, *flags], off, ["smart"], ["smart"], in_half)


def _adversarial(name: str, *off: str) -> Regularised:
    flags = [f"--{name}-epsilon", "0.5", f"--{name}-step-size", "0.3", f"--{name}-start", "0.1"]
    return Regularised(f"{name}_sentence_prediction", flags, [f"--{name}-epsilon", "0", *off], [], [], [])


_R3F = ["--r3f-epsilon", "0.3", "--r3f-epsilon-unit", "relative", "--r3f-dropout", "shared"]
_LOUD = ["--r3f-epsilon", "3"]
# what every criterion must hold is tested with each of these (test_every_criterion.py); a new one is a line here
CRITERIA = {
    "smart": _smart(),
    "smart, tangent": _smart("--smart-mode", "tangent"),
    "smart, normalized": _smart(
        *("--smart-embedding", "normalized", "--smart-epsilon", "0.1", "--smart-step-size", "1"), half="0.3"
    ),
    "pgd": _adversarial("pgd"),
    "freelb": _adversarial("freelb"),
    "freeat": _adversarial("freeat", "--freeat-steps", "1"),
    "r3f": Regularised("r3f_sentence_prediction", _R3F, ["--r3f-weight", "0"], ["r3f"], ["r3f"], _LOUD),
    "rdrop": Regularised("rdrop_sentence_prediction", [], ["--rdrop-weight", "0"], ["rdrop"], [], []),
}
KINDS = ["classes", "regression"]


def slow_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters of a test, a tuple being several; the marker slow is on all that are not ``kept``."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in kept else pytest.mark.slow)
        for case in cases
    ]


def represented(*factors: Sequence[Any], together: int = 2) -> list[Any]:
    """Every combination of the factors' options as parameters of a test; the marker slow is on most of them.

    Without it are as few as hold every ``together`` options of different factors at once. A tuple among the options
    stands for several parameters.
    """
    cases = list(itertools.product(*(range(len(factor)) for factor in factors)))
    places = list(itertools.combinations(range(len(factors)), together))
    groups = {case: {(chosen, *(case[place] for place in chosen)) for chosen in places} for case in cases}
    missing, kept = set().union(*groups.values()), set()
    while missing:
        best = max(cases, key=lambda case: len(groups[case] & missing))
        kept.add(best)
        missing -= groups[best]

    def values(case: tuple[int, ...]) -> tuple[Any, ...]:
        options = [factor[number] for factor, number in zip(factors, case)]
        return tuple(value for option in options for value in (option if isinstance(option, tuple) else (option,)))

    return slow_but([values(case) for case in kept], [values(case) for case in cases])


def write_data(
    folder: Path, *, kind: str = "classes", train: int = 24, valid: int = 10, seed: int = 1, wrong: float = 0
) -> Path:
    """A data folder for --task sentence_prediction: sequences of 3 to 9 of twelve words.

    ``kind`` "classes": the label says whether the first word is among the first six (labels 1 and 0); "pairs": the
    same, cut in two texts; "regression": the target is the share of such words. ``wrong``: the share of labels that are
    not true.
    """
    draw = random.Random(seed)
    words = Dictionary()
    for letter in "abcdefghijkl":
        words.add_symbol(letter, n=100)
    labels = Dictionary()
    for label in ("1", "0"):
        labels.add_symbol(label, n=10)
    (folder / "input0").mkdir(parents=True)
    (folder / "label").mkdir()
    words.save(str(folder / "input0" / "dict.txt"))
    if kind == "pairs":
        (folder / "input1").mkdir()
        words.save(str(folder / "input1" / "dict.txt"))
    if kind != "regression":
        labels.save(str(folder / "label" / "dict.txt"))
    for split, count in (("train", train), ("valid", valid)):
        rows = [[draw.choice("abcdefghijkl") for _ in range(draw.randint(3, 9))] for _ in range(count)]
        cuts = [1 + len(row) // 3 if kind == "pairs" else len(row) for row in rows]
        _write_indexed(folder / "input0" / split, [" ".join(row[:cut]) for row, cut in zip(rows, cuts)], words)
        if kind == "pairs":
            _write_indexed(folder / "input1" / split, [" ".join(row[cut:]) for row, cut in zip(rows, cuts)], words)
        if kind != "regression":
            true = [row[0] in "abcdef" for row in rows]
            answers = ["1" if right != (wrong > 0 and draw.random() < wrong) else "0" for right in true]
            _write_indexed(folder / "label" / split, answers, labels)
        else:
            shares = [sum(word in "abcdef" for word in row) / len(row) for row in rows]
            (folder / "label" / f"{split}.label").write_text("".join(f"{share}\n" for share in shares))
    return folder


def write_labels(folder: Path, split: str, labels: list[str], *, last: str, words: Sequence[str]) -> None:
    """Write other labels for a split of a class folder: ``labels`` with the last one replaced by ``last``."""
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word, n=10)
    dictionary.save(str(folder / "label" / "dict.txt"))
    _write_indexed(folder / "label" / split, [*labels[:-1], last], dictionary)


def _write_indexed(path: Path, lines: Sequence[str], dictionary: Dictionary) -> None:
    builder = indexed_dataset.make_builder(f"{path}.bin", impl="mmap", vocab_size=len(dictionary))
    for line in lines:
        builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).long())
    builder.finalize(f"{path}.idx")


def command(
    data: Path,
    *flags: str,
    criterion: str = "smart_sentence_prediction",
    save_dir: Path | None = None,
    num_classes: int = 2,
    optimizer: str = "mbpp",
    max_update: int | None = 6,
    validate: bool = False,
) -> list[str]:
    """Arguments for fairseq-train on a tiny model, with the paper's recipes; later flags win over these.

    The model is RoBERTa; for pairs it is BERT, which marks the second text.
    """
    return [
        *(str(data), "--user-dir", USER_DIR, "--task", "sentence_prediction", "--num-classes", str(num_classes)),
        *("--init-token", "0", *TINY_MODEL, *(("--arch", "smart_bert") if (data / "input1").is_dir() else ())),
        *("--criterion", criterion, "--optimizer", optimizer),
        *("--lr", "1e-3", "--lr-scheduler", "fixed", "--batch-size", "4", "--seed", "7"),
        *(("--smart-recipe", "paper") if criterion == "smart_sentence_prediction" else ()),
        *(("--mbpp-recipe", "paper") if optimizer == "mbpp" and "--optimizer" not in flags else ()),
        *(("--cpu",) if DEVICE == "cpu" else ()),
        *(("--max-update", str(max_update)) if max_update is not None else ()),
        *("--log-format", "json", "--log-interval", "1", "--num-workers", "0"),
        *(() if validate else ("--disable-validation",)),
        *saving(save_dir),
        *flags,
    ]


def saving(folder: Path | None) -> list[str]:
    """Flags that save into the folder, or nowhere."""
    return ["--save-dir", str(folder)] if folder else ["--no-save", "--save-dir", NOT_SAVED.name]


def parse(arguments: Sequence[str]) -> Any:
    """fairseq's configuration for these arguments of fairseq-train.

    hydra takes 0.3 s to compose one, so it is asked once for the same arguments; where files are does not matter.
    """
    paths = {path: f"/place{number}" for number, path in enumerate(dict.fromkeys(filter(_is_place, arguments)))}
    settings = pickle.loads(_parsed(*(paths.get(argument, argument) for argument in arguments)))
    return _put_in(settings, paths)


def _is_place(argument: str) -> bool:
    return argument.startswith(("/", "tcp://")) and argument != USER_DIR


@functools.cache
def _parsed(*arguments: str) -> bytes:
    """Pickled, as omegaconf's own copies share what they do not know, the model's settings among it."""
    parser = options.get_training_parser()
    settings = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=list(arguments)))
    return pickle.dumps(settings)


def _put_in(settings: Any, paths: dict[str, str]) -> Any:
    """The same settings with ``paths`` for what stands for them; fairseq keeps all in several places."""
    real = {stand_in: path for path, stand_in in paths.items()}
    owners = [settings]
    for owner in owners:
        inside = vars(owner) if isinstance(owner, argparse.Namespace) else owner
        for name, value in inside.items():
            if isinstance(value, str) and value in real:
                inside[name] = real[value]
            elif isinstance(value, argparse.Namespace) or OmegaConf.is_dict(value):
                owners.append(value)
    return settings


def train(arguments: Sequence[str], **common: Any) -> dict[str, list[dict[str, Any]]]:
    """Run fairseq-train in this process; its log lines by kind: train_inner, train, valid.

    ``common``: settings of the configuration as fairseq-hydra-train takes them (on the command line fairseq takes
    --bf16 for --tpu).
    """
    from fairseq import checkpoint_utils
    from fairseq_cli import train as fairseq_train

    # fairseq keeps the best metric of a run in a function's attribute
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    cfg = parse(arguments)
    cfg.common.update(common)
    with capture_log() as log:
        fairseq_train.main(cfg)
    return log


def refused(arguments: Sequence[str]) -> str:
    """The message with which a run of fairseq-train is refused, before its first update."""
    with capture_log() as log, pytest.raises(UsageError) as caught:
        train(arguments)
    assert not log["train_inner"]
    return str(caught.value)


def error_line(
    name: str, main: Callable[[list[str]], int], arguments: Sequence[Any], capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line with which a command of this name (a pattern) refuses its arguments."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"({name}): error: ", line), line
    return line


@contextlib.contextmanager
def capture_log() -> Any:
    """fairseq's JSON log lines as dictionaries of numbers, by kind."""
    import logging

    lines: dict[str, list[dict[str, Any]]] = {"train_inner": [], "train": [], "valid": [], "text": []}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if record.name in lines and message.startswith("{"):
                lines[record.name].append({k: _number(v) for k, v in json.loads(message).items()})
            else:
                lines["text"].append(message)  # type: ignore[arg-type]

    handler = Handler()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def build(arguments: Sequence[str]) -> Any:
    """Task, model and criterion for these arguments, with the train split loaded."""
    cfg = parse(arguments)
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model).to(DEVICE)
    criterion = task.build_criterion(cfg.criterion)
    task.load_dataset("train")
    return cfg, task, model, criterion


def set_up(
    data: Path, *flags: str, kind: str = "classes", optimizer: str = "adam", **options: Any
) -> tuple[Any, Any, Any]:
    """Task, model in training mode and criterion; with ``--optimizer mbpp`` the criterion has met it.

    The output is not flat: at initialisation the head hardly reacts to anything.
    """
    if kind == "regression":
        flags, options = ("--regression-target", *flags), {"num_classes": 1, **options}
    cfg, task, model, criterion = build(command(data, *flags, optimizer=optimizer, **options))
    torch.nn.init.normal_(model.classification_heads[HEAD].out_proj.weight, std=1.0)
    if kind == "pairs":
        types = model.encoder.sentence_encoder.token_types
        torch.nn.init.normal_(types, std=0.02, generator=torch.Generator(DEVICE).manual_seed(2))
    if optimizer == "mbpp":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        criterion.link.connect(optim.build_optimizer(cfg.optimizer, trained))
    return task, model.train(), criterion.train()


class Step(NamedTuple):
    """Loss, log and gradients by parameter name of one batch."""

    loss: torch.Tensor
    log: dict[str, Any]
    gradients: dict[str, torch.Tensor]


def count_forwards(model: Any) -> list[int]:
    """A list that grows by one for every pass through the first layer."""
    passes: list[int] = []
    model.encoder.sentence_encoder.layers[0].register_forward_hook(lambda *_: passes.append(1))
    return passes


def take_passes(model: Any, criterion: Any, sample: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """All backward passes of a batch, as the task's train_step drives them; the loss and the last pass's log."""
    getattr(criterion, "held", {}).clear()  # FreeAT: the batch is a new one
    passes = criterion.passes(model, sample) if hasattr(criterion, "passes") else [criterion(model, sample)]
    total = torch.zeros(())
    for loss, _, entries in passes:
        loss.backward()
        total, log = total + loss.detach(), entries
    return total, log


def step(model: Any, criterion: Any, sample: Any, seed: int = 3) -> Step:
    model.zero_grad()
    torch.manual_seed(seed)
    loss, log = take_passes(model, criterion, sample)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss, log, gradients)


def assert_same_gradients(actual: Step, expected: Step, **tolerance: float) -> None:
    """Of all parameters; bit for bit where no tolerance is given."""
    assert actual.gradients.keys() == expected.gradients.keys()
    compare = assert_close if tolerance else assert_equal
    for name, gradient in actual.gradients.items():
        compare(gradient, expected.gradients[name], **tolerance)


def tensors(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by their path."""
    if torch.is_tensor(state):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {key: value for name, part in items for key, value in tensors(part, f"{path}/{name}").items()}


def set_back(folder: Path, earlier: str) -> Path:
    """Put a run's checkpoint ``earlier`` in the place of its last one, which is returned; that one is straight.pt."""
    last = folder / "checkpoint_last.pt"
    last.rename(folder / "straight.pt")
    (folder / earlier).rename(last)
    return last


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, optimizer and teacher of two checkpoints, bit for bit."""
    states = [torch.load(path) for path in (one, other)]
    for part in ("model", "last_optimizer_state"):
        ours, theirs = (tensors(state[part]) for state in states)
        assert ours.keys() == theirs.keys() and len(ours) > 30
        for name in ours:
            assert_equal(ours[name], theirs[name])


def assert_close_states(
    actual: dict[str, Any], expected: dict[str, Any], atol: float = 1e-6, teacher: bool = True
) -> None:
    """Weights and teacher of two checkpoints' states."""
    for name, weight in expected["model"].items():
        assert_close(actual["model"][name], weight, rtol=0, atol=atol)
    kept = [state["last_optimizer_state"]["mbpp"]["teacher"] for state in (actual, expected)] if teacher else []
    for ours, theirs in zip(*kept):
        assert_close(ours, theirs, rtol=0, atol=atol)


def assert_resumes(arguments: Sequence[str], folder: Path, updates: int) -> None:
    """A run into ``folder`` that goes on behind so many updates logs and ends as it did in one go, bit for bit."""
    straight = train(arguments)["train_inner"]
    (earlier,) = folder.glob(f"checkpoint_*_{updates}.pt")
    last = set_back(folder, earlier.name)
    resumed = train(arguments)["train_inner"]
    assert len(resumed) == len(straight) - updates > 0
    for key in ("num_updates", "loss"):
        assert [line[key] for line in resumed] == [line[key] for line in straight[updates:]]
    assert_same_state(last, last.with_name("straight.pt"))


def flops(model: Any, criterion: Any, sample: dict[str, Any]) -> int:
    """Floating-point operations of forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        criterion(model, sample)[0].backward()
    return int(counter.get_total_flops())


class Calls(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.__name__] = self.count.get(func.__name__, 0) + 1
        return func(*args, **(kwargs or {}))


def batch(task: Any, size: int, start: int = 0) -> dict[str, Any]:
    """Examples ``start`` to ``start + size`` of the train split as one batch."""
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[i] for i in range(start, start + size)])
    return apply_to_sample(lambda tensor: tensor.to(DEVICE), sample)  # type: ignore[no-any-return]


def alter_terms(owner: Any, change: Callable[[Any, TermValue], TermValue]) -> None:
    """Let every term of ``owner``, a criterion or a class of them, pass through ``change`` with its batch."""
    original = owner.term

    @contextmanager
    def altered(*arguments: Any) -> Iterator[Callable[[torch.Tensor], TermValue]]:
        with original(*arguments) as value:
            yield lambda clean: change(arguments[-1], value(clean))

    owner.term = altered


def watch_terms(criterion: Any) -> list[TermValue]:
    """A list that grows by every smoothness term from here on, with its perturbation [B, T, C]."""
    seen: list[TermValue] = []

    def note(sample: Any, found: TermValue) -> TermValue:
        seen.append(found)
        return found

    alter_terms(criterion, note)
    return seen


def in_float64(model: Any) -> Any:
    """A copy; fairseq's own gelu works in float32."""
    model = copy.deepcopy(model).double()
    for layer in model.encoder.sentence_encoder.layers:
        if layer.activation_fn is fairseq_gelu:
            layer.activation_fn = torch.nn.functional.gelu
    return model
