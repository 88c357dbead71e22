"""What a fine-tuned checkpoint predicts for the splits of a data folder."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import register
from .data.binarize import read_ids_of, read_targets
from .data.folders import ROWS_OF, data_of, label_order, read_ids, task_of
from .data.lines import located
from .data.ranking import parts, read_groups
from .data.tasks import RIGHT, Task
from .errors import UsageError, unfit
from .progress import Progress

# a task without a training part, and the one whose model predicts it
STAND_INS = {"AX": "MNLI"}


@dataclass
class Predictions:
    """What a checkpoint says about one split: ids and labels in the order of the file.

    ``scores``: B x K probabilities of ``classes``, or B x 1 targets as the model gives them (0..1 for STS-B).
    ``groups``: of a ranking, the sizes of its groups, whose rows follow each other; ``scores`` are theirs, one a row.
    ``logits``: B x K, what the probabilities are the softmax of; for regression ``scores``.
    """

    task: Task
    split: str
    ids: list[str]
    labels: list[str]
    scores: np.ndarray
    classes: tuple[str, ...] = ()
    logits: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    groups: Sequence[int] = ()

    def ranks(self) -> list[tuple[int, int]]:
        """Of a ranking's rows the number of the group and the place in it, both from 1; of equals the first wins."""
        found = []
        for number, part in enumerate(parts(self.groups), start=1):
            order = np.argsort(-self.scores[part, 0], kind="stable")
            found += [(number, int(place)) for place in np.argsort(order) + 1]
        return found


def check_there(checkpoint: Path) -> None:
    """Raise `UsageError` for one that is no file."""
    if not checkpoint.is_file():
        what = "a folder; name a file in it, such as checkpoint_best.pt" if checkpoint.is_dir() else "no such file"
        raise located(checkpoint, f"--checkpoint: {what}")


class Model:
    """A checkpoint that `sentence_prediction` wrote, or of `smart_multitask` the folder's task, with its data.

    ``model``: fairseq's, in evaluation mode; ``head``: the name of its classification head.
    """

    def __init__(self, checkpoint: Path, folder: Path, cpu: bool = False, fp16: bool = False) -> None:
        check_there(checkpoint)
        self.folder, self.task = folder, task_of(folder)

        import torch  # what takes seconds to load comes after what can be said without

        register()  # what a checkpoint's configuration names
        self._torch, self._path = torch, checkpoint
        self._was: dict[str, Any] = {}  # in the data folder that the checkpoint is of, see `what_is_in`
        trained_on = self._load()
        self.classes = self._checked_classes(trained_on)
        self._device = torch.device("cpu" if cpu or not torch.cuda.is_available() else "cuda")
        self.model.to(self._device).eval()
        if fp16:
            self.model.half()

    def _refuse(self, message: str) -> NoReturn:
        raise located(self._path, message)

    def _load(self) -> Path:
        """Load the model for this data folder; the folder that it was trained on."""
        from fairseq import checkpoint_utils

        from .convert.checkpoint import as_written, check_head, scores_candidates, task_settings
        from .convert.single_task import folder_of, of_several_tasks, single_task

        try:
            state = checkpoint_utils.load_checkpoint_to_cpu(str(self._path))
            settings = task_settings(state)
            trained_on, kind = str(settings.get("data") or ""), settings.get("_name")
            if of_several_tasks(state):
                name = STAND_INS.get(self.task.name, self.task.name)
                trained_on = str(folder_of(state, name) or self.folder)
                state = single_task(self._path, state, name, self.folder)
            elif self.task.candidates != scores_candidates(state):
                needed = "smart_wnli" if self.task.candidates else "sentence_prediction"
                self._refuse(f"was trained for the task {kind}, not {needed}, as {self.task.name} needs")
            elif kind not in (None, "sentence_prediction", "smart_wnli"):
                self._refuse(
                    f"is of the task {kind}, such as an encoder that is not fine-tuned; give a checkpoint that "
                    f"fairseq-train wrote on {self.folder}"
                )
            self._was = data_of(state)
            regression = settings.get("regression_target")
            scored = self.task.candidates or self.task.ranking  # by one output, which is no regression's
            if not scored and regression not in (None, self.task.regression):
                it, here = ("is a regression", "has classes") if regression else ("classifies", "is a regression")
                self._refuse(f"{it}, and {self.task.name} {here}: another task's")
            with as_written(self._path):
                criterion = state["cfg"]["criterion"]
                if not self.task.candidates:
                    self.head = criterion.get("classification_head_name") or "sentence_classification_head"
                    check_head(self._path, state["model"], self.head)  # fairseq would draw what is not there
                if criterion.get("smart_validate_with") == "teacher":
                    what = "in training the teacher was validated, and these are the model's own weights"
                    print(f"{self._path}: {what}; export --teacher writes the teacher's", flush=True)
            state["args"] = None  # of checkpoints that are older than cfg, which was made from it
            state["cfg"]["task"].update({"data": str(self.folder), "no_shuffle": True})
            (self.model,), _, loaded = checkpoint_utils.load_model_ensemble_and_task([str(self._path)], state=state)
        except UsageError:
            raise
        except Exception as error:
            # whatever fairseq says about a checkpoint of something else
            reason = unfit(str(error)) if "state_dict" in str(error) else f"cannot be loaded ({type(error).__name__})"
            self._refuse(f"{reason}; give a checkpoint of fairseq-train and the data folder that it was trained on")
        # a task with a head of its own stays smart_multitask's
        (objective,) = getattr(loaded, "objectives", (None,))
        self._fairseq_task = objective.task if objective else loaded
        if self.task.candidates:
            self.head = loaded.objectives[0].head
        return Path(trained_on)

    def _checked_classes(self, trained_on: Path) -> tuple[str, ...]:
        """The labels in the order of the head's outputs; none for regression."""
        if self.task.candidates:
            return self.task.labels
        outputs = self.model.classification_heads[self.head].out_proj.out_features
        if outputs != self.task.num_classes:
            self._refuse(f"gives {outputs} outputs, and {self.task.name} has {self.task.num_classes}: another task's")
        divisor = self._was.get("divisor", self.task.divisor)
        if self.task.regression and divisor != self.task.divisor:
            self._refuse(
                f"was trained on scores from 0 to {divisor:g}, and those of {self.folder} go to {self.task.divisor:g}; "
                "prepare it on the same scale"
            )
        texts = self._was.get("texts", self.task.texts)
        if texts != self.task.texts:
            self._refuse(
                f"was trained on {ROWS_OF[texts]}, and {self.folder} has {ROWS_OF[self.task.texts]}: another task's"
            )
        if self.task.num_classes == 1:
            return ()
        classes = label_order(self.folder, outputs)
        # the head's own order, where it can be known, is right even if this folder has another
        if "labels" in self._was:
            order = tuple(self._was["labels"])
        elif (trained_on / "label" / "dict.txt").is_file():
            order = label_order(trained_on, outputs)
        else:
            order = classes
            if trained_on != Path():  # the checkpoint names one
                what = f"its classes were not compared with those of {self.folder}"
                print(f"{self._path}: trained on {trained_on}, which is gone: {what}", flush=True)
        if set(order) != set(classes):
            what = f"was trained on {trained_on} with the classes {', '.join(order)}, and {self.folder} has "
            self._refuse(f"{what}{', '.join(classes)}: another task's")
        return order

    def predict(self, split: str, max_tokens: int) -> Predictions:
        """Predictions for a split, in batches of rows of like length, at most ``max_tokens`` with the padding."""
        ids = read_ids(self.folder, split)
        logits = np.zeros((len(ids), self.task.num_classes))
        progress = Progress(len(ids), f"{self.task.name} {split}")
        with self._torch.no_grad():
            for batch, sample in self.samples(split, max_tokens):
                found = self.model(**sample["net_input"], features_only=True, classification_head_name=self.head)[0]
                if self.task.candidates:  # a batch of groups, each with some of the rows
                    from .training.candidates import row_logits

                    found, batch = row_logits(found, sample["rows"]), sample["rows"][:, 0].tolist()
                logits[batch] = found.float().cpu().numpy()
                progress.advance(len(batch))
        progress.close(" predicted")
        scores = logits if self.task.num_classes == 1 else self._torch.from_numpy(logits).softmax(-1).numpy()
        wrong = int((~np.isfinite(scores)).any(1).sum())
        if wrong:
            self._refuse(f"gives no finite numbers for {wrong} of {len(ids)} rows: its training diverged")
        if self.task.ranking:
            groups = read_groups(self.folder, split, len(ids))
            found = Predictions(self.task, split, ids, [], scores, (), logits, groups)
            found.labels = [RIGHT if rank == 1 else "0" for _, rank in found.ranks()]
            return found
        if self.task.regression:
            labels = [f"{value * self.task.divisor:.9g}" for value in scores[:, 0]]
        else:
            # a row of candidates is 1 where no other is better: a tie too
            places = (logits[:, 1] >= logits[:, 0]).astype(int) if self.task.candidates else scores.argmax(1)
            labels = [self.classes[place] for place in places]
            if len(set(labels)) == 1 < len(labels):
                print(f"{self.task.name} {split}: all {len(labels)} rows are predicted as {labels[0]}", flush=True)
        return Predictions(self.task, split, ids, labels, scores, self.classes, logits)

    def samples(
        self, split: str, max_tokens: int, places: np.ndarray | None = None
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """The rows' positions, and what fairseq makes of them on the model's device, batch by batch; as `predict`.

        places: of the rows; None for all.
        """
        task, rows = self._fairseq_task, len(read_ids(self.folder, split))
        counts = {}
        for path in self.folder.glob(f"*/{split}.idx"):  # labels, where there are any, are loaded too
            known = task.label_dictionary if path.parent.name == "label" else task.source_dictionary
            counts[path] = len(read_ids_of(path.with_suffix(""), len(known))[1])
        if self.task.regression:
            counts |= {path: len(read_targets(path)) for path in self.folder.glob(f"label/{split}.label")}
        for path, count in sorted(counts.items()):
            if count != rows:
                raise located(path, f"does not have the {rows} rows of ids/{split}.tsv; run preprocess again")
        whole = {"whole": True} if self.task.candidates else {}
        dataset = self._fairseq_task.load_dataset(split, **whole)
        sizes = np.asarray(dataset.sizes[0])
        over = int((sizes > self.max_positions).sum())
        if over:
            most = self.max_positions
            message = f"{split} has {over} rows above the model's {most} tokens; preprocess --max-tokens {most}"
            raise located(self.folder, message)
        places = np.arange(len(sizes)) if places is None else places
        for chosen in batches(sizes[places], max_tokens):
            batch = places[chosen].tolist()
            sample = dataset.collater([dataset[place] for place in batch])
            inputs = {name: value.to(self._device) for name, value in sample["net_input"].items()}
            yield batch, {**sample, "net_input": inputs}

    @property
    def max_positions(self) -> int:
        """The longest row that it takes, in tokens."""
        return int(self.model.max_positions())

    def on(self, folder: Path) -> "Model":
        """The same model for the rows of another folder, whose dictionaries and classes are those of this one."""
        other = copy.copy(self)
        other.folder, other._fairseq_task = folder, copy.copy(self._fairseq_task)
        other._fairseq_task.datasets = {}
        other._fairseq_task.cfg = copy.deepcopy(self._fairseq_task.cfg)
        other._fairseq_task.cfg.data = str(folder)
        return other


def batches(sizes: np.ndarray, max_tokens: int) -> Iterator[list[int]]:
    """Positions in batches, longest first, so that a batch that is too large shows at once."""
    batch: list[int] = []
    for place in np.argsort(-sizes, kind="stable"):
        if batch and (len(batch) + 1) * sizes[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(int(place))
    if batch:
        yield batch
