"""GLUE's metrics over the whole validation set, whatever the batch size and the number of workers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finish, start
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from toolkit import HEAD, command, slow_but, train, write_data

import smart_fairseq  # noqa: F401  allow-lists what checkpoints hold

REPORT = {
    "classes": ["--report-mcc", "--report-acc-and-f1"],
    "regression": ["--regression-target", "--num-classes", "1", "--report-pearson-and-spearman"],
}
KEYS = {
    "classes": ["mcc", "f1", "acc_and_f1", "accuracy"],
    "regression": ["pearson", "spearman", "pearson_and_spearman"],
}


@pytest.fixture(scope="module", params=["classes", "regression"])
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind, data with 23 validation examples, a checkpoint of a few updates, and its true metrics."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    data = write_data(folder / "data", kind=kind, train=24, valid=23, seed=5)
    train(command(data, *REPORT[kind], "--lr", "1e-2", save_dir=folder / "run", max_update=8))
    checkpoint = folder / "run" / "checkpoint_last.pt"
    return kind, data, checkpoint, true_metrics(kind, data, checkpoint)


def true_metrics(kind: str, data: Path, checkpoint: Path) -> dict[str, float]:
    """From predictions made one example at a time, by scikit-learn and SciPy."""
    from fairseq import checkpoint_utils

    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(data)})
    model = models[0].eval()
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    outputs, targets = [], []
    with torch.no_grad():
        for index in range(len(dataset)):
            sample = dataset.collater([dataset[index]])
            logits = model(**sample["net_input"], classification_head_name=HEAD)[0]
            outputs.append(float(logits[0, 0]) if kind == "regression" else int(logits.argmax()))
            targets.append(float(sample["target"].view(-1)[0]))
    if kind == "regression":
        pearson, spearman = pearsonr(outputs, targets)[0], spearmanr(outputs, targets)[0]
        found = {"pearson": pearson, "spearman": spearman, "pearson_and_spearman": (pearson + spearman) / 2}
    else:
        names = [task.label_dictionary[i + task.label_dictionary.nspecial] for i in range(2)]
        outputs, targets = [int(names[i]) for i in outputs], [int(names[int(i)]) for i in targets]
        accuracy = sum(a == b for a, b in zip(outputs, targets)) / len(targets)
        f1 = f1_score(targets, outputs)
        found = {"mcc": matthews_corrcoef(targets, outputs), "f1": f1, "acc_and_f1": (f1 + accuracy) / 2}
        found["accuracy"] = accuracy
        assert 0 < accuracy < 1
    return {key: round(100 * float(value), 1) for key, value in found.items()}


def validation(data: Path, kind: str, checkpoint: Path, *flags: str) -> list[str]:
    """Arguments of a run that takes one update with learning rate 0 and validates."""
    return command(
        data, *REPORT[kind], "--restore-file", str(checkpoint), "--reset-optimizer", "--reset-dataloader",
        "--reset-meters", "--lr", "0", "--stop-min-lr", "-1", "--weight-decay", "0", *flags,
        max_update=1, validate=True,
    )  # fmt: skip


@pytest.mark.parametrize("batch_size", ["1", "4", "23"])
def test_any_batch_size(batch_size: str, trained: Any) -> None:
    kind, data, checkpoint, expected = trained
    log = train(validation(data, kind, checkpoint, "--batch-size-valid", batch_size))
    assert {key: log["valid"][-1][f"valid_{key}"] for key in KEYS[kind]} == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize("trained", slow_but(["classes"], KEYS), indirect=True)
def test_two_workers(trained: Any, tmp_path: Path) -> None:
    """23 examples in batches of 2 over two workers: the last batch of one of them is empty."""
    kind, data, checkpoint, expected = trained
    arguments = validation(data, kind, checkpoint, "--batch-size-valid", "2", "--ddp-backend", "legacy_ddp")
    finish(start(arguments, tmp_path / "run", workers=2), tmp_path / "run")
    # the second worker logs nothing
    line = json.loads(re.findall(r"INFO:valid:(\{.*\})", (tmp_path / "run.0.log").read_text())[-1])
    assert {key: float(line[f"valid_{key}"]) for key in KEYS[kind]} == pytest.approx(expected, abs=0.051)


def test_calibration_error_over_the_whole_set(tmp_path: Path) -> None:
    """By hand from single predictions: 15 bins of equal width, each gap by its share of the rows; in any batch size."""
    from fairseq import checkpoint_utils

    data = write_data(tmp_path / "data", train=24, valid=23, seed=5)
    flags = ["--smart-report-calibration", "--best-checkpoint-metric", "calibration_error"]
    valid = ["--max-epoch", "1", "--validate-interval", "1"]
    found = []
    for size in ("5", "23"):
        run = command(data, *flags, *valid, "--batch-size-valid", size, save_dir=tmp_path / size, validate=True)
        found.append(train(run)["valid"][-1]["valid_calibration_error"])
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "23" / "checkpoint_last.pt")])
    dataset, bins = task.load_dataset("valid") or task.dataset("valid"), [[] for _ in range(15)]
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        with torch.no_grad():
            logits = models[0].eval()(**sample["net_input"], classification_head_name=HEAD)[0][0]
        sure, best = logits.double().softmax(0).max(0)
        bins[min(14, int(sure * 15))].append((float(sure), float(best == sample["target"].view(-1)[0])))
    gaps = [abs(sum(sure for sure, _ in part) - sum(right for _, right in part)) for part in bins]
    assert found == pytest.approx([100 * sum(gaps) / 23] * 2, abs=0.06)  # one decimal is logged
