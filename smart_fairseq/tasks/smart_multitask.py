"""`smart_multitask`: several prepared data folders at once, with one encoder and a classification head for each task.

Paper: Liu et al. (2019), MT-DNN, section 3 and algorithm 1: an epoch holds the batches of all tasks in random order, a
batch is of one task, and its loss is that task's. The heads are fairseq's, or with --multitask-san the paper's
stochastic answer network for pairs (`method/answer.py`). Each task is fairseq's own `sentence_prediction` inside, so
that a single one trains as it does there, update by update.
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq import models
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import register_task
from fairseq.tasks.sentence_prediction import SHORTEN_METHOD_CHOICES, SentencePredictionConfig, SentencePredictionTask
from omegaconf import II, MISSING, OmegaConf, open_dict

from ..config.flags import flag
from ..convert.checkpoint import HEAD_PARTS, check_head
from ..convert.single_task import head_of
from ..data.binarize import read_manifest
from ..data.folders import DATA, check_split, find_tasks, what_is_in
from ..data.lines import as_number, shown
from ..data.ranking import read_groups
from ..data.tasks import Task
from ..errors import UsageError, refuse, require
from ..method.answer import StochasticAnswer
from ..training.batches import GroupedDataset, MultitaskDataset
from ..training.checks import check_for_several_tasks
from ..training.criterion import RegularizedCriterion
from ..training.objective import Objective, common, log_by_task

logger = logging.getLogger(__name__)

TASKS_FLAG = "--multitask-tasks"


# fairseq reads these annotations at run time: no `from __future__ import annotations` in this file
@dataclass
class MultitaskConfig(FairseqDataclass):
    data: str = flag(MISSING, "folder of the data folders, or one of them")
    multitask_tasks: Optional[str] = flag(
        None, "data folders in that folder, with commas between; not set: all that it holds"
    )
    multitask_alpha: float = flag(
        1.0,
        "an epoch takes batches of each task in proportion to the number of all its batches to this power: "
        "1 takes each once, 0 as many of every task",
    )
    multitask_dropout: Optional[str] = flag(
        None, "dropout of single tasks' heads in the place of --pooler-dropout, as in CoLA=0.05,MNLI=0.3"
    )
    multitask_san: Optional[str] = flag(
        None, "tasks of pairs that get a stochastic answer network as their head, as in RTE,MRPC"
    )
    multitask_san_steps: int = flag(5, "reading steps of these heads")
    multitask_san_dropout: float = flag(
        0.1, "share of these heads' steps whose answers training leaves out (stochastic prediction dropout)"
    )
    # the rest as sentence_prediction has it
    init_token: Optional[int] = flag(None, "add token at the beginning of each batch item")
    separator_token: Optional[int] = flag(None, "add separator token between inputs")
    no_shuffle: bool = flag(False, "keep the rows of each task in their order")
    shorten_method: SHORTEN_METHOD_CHOICES = flag(
        "none", "if not none, shorten sequences that exceed tokens_per_sample"
    )
    shorten_data_split_list: str = flag("", "comma-separated list of dataset splits to apply shortening to")
    max_positions: int = flag(512, "max tokens per example")
    # bare interpolations, so that they do not become flags
    seed: int = II("common.seed")


@register_task("smart_multitask", dataclass=MultitaskConfig)
class SmartMultitask(SentencePredictionTask):
    """The task; its flags are `MultitaskConfig`.

    Attributes:
        objectives: of its tasks, in the order of the folders; a batch carries its task's number among them.

    Raises `UsageError` for a folder that is missing or was not written by preprocess, and where a split is loaded for
    one whose files are missing or damaged.
    """

    def __init__(self, cfg: MultitaskConfig, found: Dict[str, Any]) -> None:
        require(cfg.multitask_alpha >= 0, "--multitask-alpha", cfg.multitask_alpha, "0 or above, as 1 or 0.5")
        self.tasks: List[Task] = [task for task, _ in found.values()]
        self.objectives = [_objective(cfg, name, *there) for name, there in found.items()]
        self.dropout = _dropout(cfg.multitask_dropout, list(found))
        self.answers = _answers(cfg, self.tasks)
        first = self.objectives[0].task
        super().__init__(cfg, first.dictionary, first.label_dictionary)
        self.state.merge_state_dict({DATA: {name: what_is_in(folder) for name, (_, folder) in found.items()}})

    @classmethod
    def setup_task(cls, cfg: MultitaskConfig, **kwargs: Any) -> "SmartMultitask":
        names = None if cfg.multitask_tasks is None else cfg.multitask_tasks.split(",")
        found = find_tasks(TASKS_FLAG, Path(cfg.data), names)
        for task, folder in found.values():
            if task.candidates:
                refuse(
                    folder,
                    "holds candidates for pronouns, not classes",
                    f"train on it by --task smart_wnli; name the other folders by {TASKS_FLAG}",
                )
        return cls(cfg, found)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> MultitaskDataset:
        """All tasks' rows of ``train``, of another split those of the tasks that have it; a line names the others."""
        datasets: Dict[int, Any] = {}
        without: List[str] = []
        for number, (task, objective) in enumerate(zip(self.tasks, self.objectives)):
            folder = Path(objective.task.cfg.data)
            if split != "train" and split not in read_manifest(folder)["rows"]:
                without.append(objective.name)
                continue
            check_split(folder, split, task, len(self.source_dictionary))
            rows = datasets[number] = objective.task.load_dataset(split, combine=combine, **kwargs)
            if task.ranking:
                sizes = read_groups(folder, split, len(rows))
                datasets[number] = GroupedDataset(rows, sizes, None if self.cfg.no_shuffle else self.cfg.seed)
        if not datasets:
            raise UsageError(f"{self.cfg.data}: no task has a split {split}; choose another one")
        if without:
            logger.warning(f"{split} goes without {', '.join(without)}: {self.cfg.data} holds no such split of it")
        exponent = self.cfg.multitask_alpha if split == "train" else 1.0
        dataset = self.datasets[split] = MultitaskDataset(datasets, exponent, self.cfg.seed)
        return dataset

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        with open_dict(cfg) if OmegaConf.is_config(cfg) else contextlib.nullcontext():
            cfg.max_positions = self.cfg.max_positions
        model = models.build_model(cfg, self, from_checkpoint)
        for objective in self.objectives:
            if objective.name in self.answers:
                self._register_answer(model, objective)
            else:
                model.register_classification_head(objective.head, num_classes=objective.num_classes)
            if objective.name in self.dropout:
                model.classification_heads[objective.head].dropout.p = self.dropout[objective.name]
        if from_checkpoint:
            _demand_heads(model, self.objectives)
        return model

    def _register_answer(self, model: Any, objective: Objective) -> None:
        dictionary, cfg = self.source_dictionary, self.cfg
        if getattr(model.args, "spectral_norm_classification_head", False):
            raise UsageError(
                "--spectral-norm-classification-head is set with --multitask-san; leave one of the two out"
            )
        around = {dictionary.pad(), dictionary.eos(), cfg.init_token, cfg.separator_token} - {None}
        head = model.classification_heads[objective.head] = StochasticAnswer(
            model.args.encoder_embed_dim,
            objective.num_classes,
            steps=cfg.multitask_san_steps,
            dropout=model.args.pooler_dropout,
            step_dropout=cfg.multitask_san_dropout,
            end=dictionary.eos(),
            special=sorted(around),
        )
        # heads are given the features alone; a bound method goes along where a model is copied
        model.encoder.register_forward_pre_hook(head.note)

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if not issubclass(CRITERION_REGISTRY[cfg._name], RegularizedCriterion):
            raise UsageError(
                f"--criterion is {cfg._name} with --task smart_multitask, which needs one of this package, such as "
                "smart_sentence_prediction (with --smart-weight 0 without its term)"
            )
        check_for_several_tasks(cfg)
        return super().build_criterion(cfg, from_checkpoint)

    def reduce_metrics(self, logging_outputs: Sequence[Dict[str, Any]], criterion: Any) -> None:
        """What all tasks have in common as the criterion logs it, and under each task's name what it alone has."""
        super().reduce_metrics([common(log) for log in logging_outputs], criterion)
        log_by_task(self.objectives, logging_outputs, criterion.cfg.smart_report_calibration)


def _objective(cfg: MultitaskConfig, name: str, task: Task, folder: Path) -> Objective:
    head = head_of(name)
    shared = {key: getattr(cfg, key) for key in SentencePredictionConfig.__dataclass_fields__ if hasattr(cfg, key)}
    # of a ranking the labels, right and wrong, though its head has one output
    about = {"data": str(folder), "num_classes": len(task.labels) or 1, "regression_target": task.regression}
    settings = SentencePredictionConfig(**{**shared, **about, "classification_head_name": head, "_name": None})
    inner = SentencePredictionTask.setup_task(settings)
    return Objective(inner, head, task.num_classes, task.regression, name, task.metrics, task.ranking)


def _dropout(text: Optional[str], names: Sequence[str]) -> Dict[str, float]:
    """By task what ``--multitask-dropout`` says."""
    found = {}
    for part in text.split(",") if text else ():
        name, _, value = part.strip().partition("=")
        allowed = f"TASK=SHARE with one of {', '.join(names)} and a share from 0 to below 1"
        require(name in names and 0 <= as_number(value) < 1, "--multitask-dropout", shown(part), allowed)
        found[name] = as_number(value)
    return found


def _answers(cfg: MultitaskConfig, tasks: Sequence[Task]) -> List[str]:
    """The tasks of ``--multitask-san``."""
    require(cfg.multitask_san_steps >= 1, "--multitask-san-steps", cfg.multitask_san_steps, "1 or more")
    share = cfg.multitask_san_dropout
    require(0 <= share < 1, "--multitask-san-dropout", share, "a share from 0 to below 1")
    names = [name.strip() for name in (cfg.multitask_san or "").split(",") if name.strip()]
    pairs = [task.name for task in tasks if task.texts == 2 and not task.ranking]
    allowed = (
        f"of the tasks of pairs, {', '.join(pairs) or 'of which there are none here'} (no ranking, no single texts)"
    )
    for name in names:
        require(name in pairs, "--multitask-san", shown(name), allowed)
    return names


def _demand_heads(model: Any, objectives: Sequence[Objective]) -> None:
    """Let the model load no checkpoint for evaluation that lacks a head; fairseq would draw a random one."""
    load = model.load_state_dict

    @functools.wraps(load)
    def load_with_heads(state: Any, *args: Any, **kwargs: Any) -> Any:
        for objective in objectives:
            head = model.classification_heads[objective.head]
            parts = set(head.state_dict()) if isinstance(head, StochasticAnswer) else HEAD_PARTS
            check_head(Path("the checkpoint"), state, objective.head, parts)
        return load(state, *args, **kwargs)

    model.load_state_dict = load_with_heads
