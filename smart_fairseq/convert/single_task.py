"""One task of a ``--task smart_multitask`` checkpoint as a checkpoint of ``--task sentence_prediction``.

Its weights are the encoder's and the head's, whose name becomes fairseq's own; its configuration is what a run on that
task's data folder alone would have left. The heads tell the tasks, and their outputs the kind: one output is a
regression. With a head of --multitask-san, which `sentence_prediction` does not know, it stays one of smart_multitask.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..data.folders import DATA, data_of, find_tasks, task_of
from ..errors import UsageError, refuse
from ..training.metrics import REPORTED
from .checkpoint import check_head, task_settings

HEADS, HEAD = "classification_heads.", "sentence_classification_head"
ANSWER = "attention.weight"  # a part that only a head of --multitask-san has


def head_of(task: str) -> str:
    """The head's name; torch's names of modules have no dots."""
    return task.replace(".", "_")


def of_several_tasks(state: dict[str, Any]) -> bool:
    """Whether a checkpoint is smart_multitask's."""
    return bool(task_settings(state).get("_name") == "smart_multitask")


def heads_of(state: dict[str, Any]) -> list[str]:
    """The names of a checkpoint's classification heads, which are those of its tasks."""
    return list(dict.fromkeys(name.split(".")[1] for name in state["model"] if name.startswith(HEADS)))


def folder_of(state: dict[str, Any], task: str) -> Path | None:
    """The data folder that a task of smart_multitask was trained on; None where it is not there any more."""
    settings = state["cfg"]["task"]
    names = settings.get("multitask_tasks")
    try:
        found = find_tasks("", Path(settings["data"]), names.split(",") if names else None)
    except UsageError:
        return None
    return found[task][1] if task in found else None


def chosen_task(path: Path, state: dict[str, Any], task: str | None) -> dict[str, Any]:
    """The state, read from ``path``, of the task that ``--task`` names; errors as `single_task`.

    Raises `UsageError` where the flag is not given and there are several tasks, or is given and there are none.
    """
    if not of_several_tasks(state):
        if task is not None:
            refuse(path, "is not of --task smart_multitask", "leave --task out")
        return state
    if task is None:
        refuse(path, f"holds the tasks {', '.join(heads_of(state)) or 'none'}", "choose one by --task")
    return single_task(path, state, task)


def single_task(path: Path, state: dict[str, Any], task: str, data: Path | None = None) -> dict[str, Any]:
    """The state of a smart_multitask checkpoint as that of a run on ``task`` alone.

    Args:
        path: that ``state`` was read from. It is not changed.
        data: the task's data folder; None for the one that it was trained on.

    Raises `UsageError` for a task that is not there, or not with its whole head.
    """
    head, heads = head_of(task), heads_of(state)
    if heads and head not in heads:
        refuse(path, f"holds no task {task}", f"its tasks are {', '.join(heads)}")
    check_head(path, state["model"], head)
    own = f"{HEADS}{head}."
    model = {
        name.replace(own, f"{HEADS}{HEAD}.", 1): weight
        for name, weight in state["model"].items()
        if name.startswith(own) or not name.startswith(HEADS)
    }
    remembered = {**(state.get("task_state") or {}), DATA: data_of(state).get(task, {})}
    state = {**state, "task_state": remembered}
    outputs = len(model[f"{HEADS}{HEAD}.out_proj.bias"])
    folder = data or folder_of(state, task)
    if f"{HEADS}{HEAD}.{ANSWER}" in model:
        return _with_answer(state, model, task, folder)
    metric = task_of(folder).metrics[0] if folder else ""
    about = {
        "num_classes": outputs,
        "regression_target": outputs == 1,
        "classification_head_name": HEAD,
        "data": str(folder or Path(state["cfg"]["task"]["data"]) / task),
        "add_prev_output_tokens": False,
        "d2v2_multi": False,
    }
    reports = {flag: metric in names for flag, names in REPORTED.items()}
    criterion = {"regression_target": outputs == 1, "classification_head_name": HEAD, **reports}
    return {**state, "model": model, "cfg": _changed(state["cfg"], about, criterion)}


def _with_answer(state: dict[str, Any], model: dict[str, Any], task: str, folder: Path | None) -> dict[str, Any]:
    """The state for smart_multitask with the folder's task alone, which has a head of --multitask-san."""
    name = task_of(folder).name if folder else task
    model = {key.replace(f"{HEADS}{HEAD}.", f"{HEADS}{head_of(name)}.", 1): weight for key, weight in model.items()}
    cfg = copy.deepcopy(state["cfg"])
    about = {"multitask_tasks": None, "multitask_dropout": None, "multitask_san": name}
    cfg["task"].update({**about, **({"data": str(folder)} if folder else {})})
    cfg["criterion"].update({"classification_head_name": head_of(name)})
    return {**state, "model": model, "cfg": cfg}


def _changed(cfg: Any, about: dict[str, Any], criterion: dict[str, Any]) -> Any:
    """A copy of fairseq's configuration, of its own kind, for what is said ``about`` the task, and the criterion."""
    cfg = copy.deepcopy(cfg)
    if OmegaConf.is_config(cfg):
        OmegaConf.set_struct(cfg, False)
    sections = [(cfg["task"], {"_name": "sentence_prediction", **about}), (cfg["criterion"], criterion)]
    if isinstance(cfg["model"], argparse.Namespace):  # the whole command line
        sections.append((vars(cfg["model"]), {"task": "sentence_prediction", **criterion, **about}))
    for settings, values in sections:
        for name in [name for name in settings if name.startswith("multitask_")]:  # which a run on one task has not
            settings.pop(name, None)
        settings.update(values)
    return cfg
