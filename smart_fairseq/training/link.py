"""The seam between the criterion and the optimizer, which never meet in fairseq.

The optimizer `mbpp` owns the teacher; the criterion needs the teacher's output. The only call that holds both is
``task.train_step(sample, model, criterion, optimizer, ...)``, so `TrainingLink` stands there: it wraps that method
on the task object (not on its class) and notes the optimizer before the criterion runs. Nothing is guessed from names
or from the order in which things were built, so several trainers may live in one process, and a rebuilt optimizer is
picked up at the next step. In the same way it hears ``task.begin_epoch(epoch, model)``, the first moment when model and
data both exist and training has not begun: the place for checks.

fairseq calls the criterion once for a batch and takes one backward pass. For a criterion that needs several
(`SeveralPasses`) the task's own train_step runs once for each, so that autocast, loss scaling and ``ignore_grad`` are
fairseq's, and a pass's graph is gone before the next begins. All but the last run without synchronising workers.

The optimizer holds the teacher as a list of float32 tensors in the order of the parameters that it updates. Those are
the model's own parameters, or float32 copies of them (``--fp16``, ``--bf16``), which FP16Optimizer keeps in the order
of its ``fp16_params``, perhaps as one flat tensor. `TrainingLink.weights` gives each tensor (a view, where it is flat;
a copy, written once per update, where the model is in half precision) the name of its parameter.
"""

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..optim.mbpp import MBPP

# loss, sample size, log: what a criterion's forward returns
Result = tuple[Tensor, int, dict[str, Any]]
# of train_step's arguments; fairseq's trainer calls it by them, and once, on its way to an error, by their order
_NAMES = ("sample", "model", "criterion", "optimizer", "update_num", "ignore_grad")


class SeveralPasses(Protocol):
    """A criterion that takes several backward passes over a batch.

    num_passes: how many, from 1; the same for every batch and worker.
    """

    num_passes: int

    def passes(self, model: nn.Module, sample: dict[str, Any]) -> Generator[Result]:
        """A `Result` for each pass; when the next is asked for, the last one's backward has run.

        Gradients add up, so each loss carries its share of the whole. Sample size and log of the last pass count. What
        a backward leaves in a tensor of the criterion's own is scaled as fairseq scales the loss: it may be 0
        (a batch that only keeps a worker in step), and in float16 infinite.
        """
        ...


class _Passes:
    """In the criterion's place in a task's train_step: a call takes the next pass, all else is the criterion's."""

    def __init__(self, criterion: SeveralPasses) -> None:
        self._criterion = criterion
        self._passes: Generator[Result] | None = None
        self.taken = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._criterion, name)

    def __call__(self, model: nn.Module, sample: dict[str, Any], *_: Any, **__: Any) -> Result:
        self._passes = self._passes or self._criterion.passes(model, sample)
        self.taken += 1
        result = next(self._passes, None)
        if result is None:
            raise RuntimeError(f"{type(self._criterion).__name__}.passes ended before pass {self.taken}")
        return result

    def close(self) -> None:
        """Let go of what the last pass left, and undo what it had changed for a while."""
        if self._passes is not None:
            self._passes.close()


@contextmanager
def _unsynchronised(model: Any) -> Iterator[None]:
    """`no_sync` of a distributed wrapper, if there is one; it ends also where the block raises.

    That of fairseq's legacy_ddp has no ``finally``: an exception on its way through would leave it on for good.
    """
    no_sync: Any = model.no_sync() if hasattr(model, "no_sync") else nullcontext()
    no_sync.__enter__()
    try:
        yield
    finally:
        no_sync.__exit__(None, None, None)


def _in_passes(train_step: Callable[..., Any], criterion: SeveralPasses, given: dict[str, Any]) -> Any:
    """Run ``train_step`` once for every pass of the criterion; what the last one returned."""
    result: Any = None
    with closing(_Passes(criterion)) as passes:
        for number in range(1, criterion.num_passes + 1):
            with _unsynchronised(given["model"]) if number < criterion.num_passes else nullcontext():
                result = train_step(**{**given, "criterion": passes})
            if passes.taken != number:
                raise RuntimeError("several passes need a task whose train_step calls the criterion once")
    return result


class TrainingLink:
    """What the criterion knows of the optimizer, and of the training around it.

    Args:
        on_epoch: called with the model when an epoch begins, before its first batch.
    """

    def __init__(self, on_epoch: Callable[[nn.Module], None] = lambda model: None) -> None:
        self.on_epoch = on_epoch
        self.update_num = 0  # of the update that is being taken
        self._optimizer: Any = None
        self._names: list[str] = []  # of the parameters that the optimizer updates, in its order
        self._copies: list[Tensor] = []  # of the teacher, in the model's precision
        self._cache: dict[str, Tensor] = {}
        self._cache_version = -1

    def listen(self, task: Any) -> None:
        """Stand in the task's train_step, and hear when its epochs begin."""
        train_step, begin_epoch = task.train_step, task.begin_epoch

        @functools.wraps(train_step)
        def linked_train_step(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(_NAMES, args)), **kwargs}
            self.connect(given["optimizer"])
            self.update_num = int(given["update_num"])
            if hasattr(given["criterion"], "passes"):
                return _in_passes(train_step, given["criterion"], given)
            return train_step(*args, **kwargs)

        @functools.wraps(begin_epoch)
        def heard_begin_epoch(epoch: int, model: nn.Module) -> Any:
            self.on_epoch(model)
            return begin_epoch(epoch, model)

        task.train_step, task.begin_epoch = linked_train_step, heard_begin_epoch

    def connect(self, optimizer: Any) -> None:
        """Use the teacher of ``optimizer`` (an `MBPP`, or one of fairseq's wrappers around it)."""
        if optimizer is not self._optimizer:
            self._optimizer, self._names, self._copies, self._cache_version = optimizer, [], [], -1

    @property
    def connected(self) -> bool:
        """Whether an optimizer was heard of."""
        return self._optimizer is not None

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The teacher's weights by the bare model's parameter names, in its precision, without gradients.

        They are good until the teacher moves: the next call writes over a copy.

        Raises RuntimeError where no optimizer with a teacher was heard of, or it updates another model.
        """
        mbpp = self._optimizer
        for wrapped in ("fp32_optimizer", "wrapped_optimizer"):  # inside fairseq's wrappers for precision
            mbpp = getattr(mbpp, wrapped, mbpp)
        if not isinstance(mbpp, MBPP):
            raise RuntimeError(
                "the Bregman term needs --optimizer mbpp, and no such optimizer has taken part in a step"
            )
        mbpp.teacher_is_read = True
        if mbpp.teacher is None:  # no update yet: the teacher is the weights themselves
            return {name: parameter.detach() for name, parameter in model.named_parameters()}
        if self._cache_version != mbpp.teacher_version:
            self._cache = self._by_name(model, mbpp.teacher)
            self._cache_version = mbpp.teacher_version
        return self._cache

    def _by_name(self, model: nn.Module, teacher: list[Tensor]) -> dict[str, Tensor]:
        # the model's own parameters, in the order of what the optimizer updates
        updated: list[Tensor] = getattr(self._optimizer, "fp16_params", None) or list(self._optimizer.params)
        if not self._names:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            if not all(id(parameter) in names for parameter in updated):
                raise RuntimeError("the optimizer mbpp updates parameters that are not this model's")
            self._names = [names[id(parameter)] for parameter in updated]
        if len(teacher) != len(updated):  # one flat tensor per device
            teacher = _views(teacher, updated)
        if any(t.dtype != parameter.dtype for t, parameter in zip(teacher, updated)):
            # into the copies that are there: new ones would need room beside them, and a launch each
            self._copies = self._copies or [torch.empty_like(parameter) for parameter in updated]
            torch._foreach_copy_(self._copies, teacher)
            teacher = self._copies
        return dict(zip(self._names, teacher))


def _views(flat: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The pieces of the flat tensors, one a device, that belong to the tensors of ``like``, in order, as views."""
    rest = {tensor.device: tensor for tensor in flat}
    views = []
    for tensor in like:
        piece, rest[tensor.device] = rest[tensor.device].tensor_split([tensor.numel()])
        views.append(piece.view_as(tensor))
    return views
