"""One run of a study, as a process of its own: fairseq-train, then the logits of the valid split.

    python -m smart_fairseq.study.worker LOGITS.npz JSON TRAIN_FLAGS...

The weights are attacked, and predict the rows of other folders, where that is asked for. The checkpoint is deleted at
the end, whether all went well or not, unless it is to be kept. The process ends with the one that started it, even if
that was killed.
"""

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import whole_file
from ..inference import batches
from ..patches import allow_fairseq_checkpoints
from .attacked import Attack, attacked

MAX_TOKENS = 4096
NICENESS = 5

logger = logging.getLogger("scored")


def leave_with_parent() -> None:
    """End this process when the other end of standard input closes."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Stopwatch(logging.Handler):
    """Processor time at the first and the last of fairseq's lines on an update."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "train_inner":  # fairseq renames its logger for the line
            self.times.append(time.process_time())

    def per_update(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)


def train(arguments: list[str], common: Mapping[str, Any] | None = None) -> Stopwatch:
    """fairseq-train in this process, with its format of log lines.

    common: settings of fairseq's configuration, because on the command line it takes --bf16 for --tpu.
    """
    from fairseq import distributed_utils, options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli import train as fairseq_train

    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, stream=sys.stdout, force=True)
    watch = Stopwatch()
    logging.getLogger().addHandler(watch)
    parsed = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
    cfg = convert_namespace_to_omegaconf(parsed)
    cfg.common.update(common or {})
    distributed_utils.call_main(cfg, fairseq_train.main)
    return watch


class Trained:
    """A checkpoint with the rows of its data folder's valid split, in their order."""

    def __init__(self, checkpoint: Path, data: str) -> None:
        import torch
        from fairseq import checkpoint_utils

        overrides = {"data": data, "no_shuffle": True}
        (self.model,), config, self.task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], overrides)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not config.common.cpu else "cpu")
        self.model.to(self.device).eval()
        self.head = config.criterion.get("classification_head_name") or "sentence_classification_head"
        self.open(data)
        self.num_classes, self.regression = config.task.num_classes, config.task.regression_target

    def open(self, data: str) -> None:
        """Another data folder, of the same classes and dictionary."""
        self.task.cfg.data = data
        self.dataset: Any = self.task.load_dataset("valid")
        self.sizes = np.asarray(self.dataset.sizes[0])

    def sample(self, rows: list[int]) -> tuple[dict[str, Any], Any]:
        """(the model's inputs, labels [B]) of some rows."""
        sample = self.dataset.collater([self.dataset[row] for row in rows])
        inputs = {name: value.to(self.device) for name, value in sample["net_input"].items()}
        return inputs, sample["target"].reshape(-1)

    def predict(self) -> tuple[np.ndarray, np.ndarray]:
        """(logits [N, K], labels [N])."""
        import torch

        logits = np.zeros((len(self.dataset), self.num_classes), dtype=np.float32)
        labels = np.zeros(len(self.dataset), dtype=np.float32 if self.regression else np.int64)
        with torch.inference_mode():
            for rows in batches(self.sizes, MAX_TOKENS):
                inputs, targets = self.sample(rows)
                found, _ = self.model(**inputs, features_only=True, classification_head_name=self.head)
                logits[rows], labels[rows] = found.float().cpu().numpy(), targets.numpy()
        return logits, labels

    def forward(self, rows: list[int]) -> tuple[Any, Any, Any]:
        """For `attacked`."""
        from ..encoder import Forward, encoder_of
        from ..evaluation.attack import PLACE

        inputs, targets = self.sample(rows)
        forward = Forward(encoder_of(self.model), self.model, inputs, self.head, PLACE)
        gold = targets.view(-1, 1) if self.regression else targets
        return forward, inputs["src_tokens"], gold.to(self.device)


def main(out: Path, beside: Mapping[str, Any], arguments: list[str]) -> None:
    """Train, predict, attack, store: ``out`` is there whole or not at all.

    beside: whether to ``keep`` the checkpoint, the ``seed``, an `Attack`'s values or None as ``attack``, and folders by
        name as ``transfer``.
    """
    leave_with_parent()
    os.nice(NICENESS)
    allow_fairseq_checkpoints()
    save_dir = Path(arguments[arguments.index("--save-dir") + 1])
    shutil.rmtree(save_dir, ignore_errors=True)  # of a run that was cut off: fairseq would go on from there
    try:
        said = _train_and_store(out, beside, arguments, save_dir / "checkpoint_last.pt")
    finally:
        if not beside["keep"]:
            shutil.rmtree(save_dir, ignore_errors=True)
    logger.info(json.dumps(said))


def _train_and_store(
    out: Path, beside: Mapping[str, Any], arguments: list[str], checkpoint: Path
) -> dict[str, int | float]:
    """Rows and processor time, for the log."""
    watch = train(arguments)
    trained = Trained(checkpoint, arguments[0])
    logits, labels = trained.predict()
    if not np.isfinite(logits).all():
        sys.exit(f"{int((~np.isfinite(logits)).any(1).sum())} rows have no finite logits: the training diverged")
    stored: dict[str, Any] = {"logits": logits, "labels": labels}
    if beside["attack"]:
        asked = Attack(**beside["attack"])
        stored |= attacked(asked, beside["seed"], logits, labels, trained.sizes, trained.forward)
    rows = {"rows": len(labels)}
    for name, folder in beside["transfer"].items():
        trained.open(folder)
        stored[f"logits_on_{name}"], stored[f"labels_on_{name}"] = trained.predict()
        rows[f"rows_on_{name}"] = len(trained.dataset)
    with whole_file(out) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **stored)
    return {**rows, "cpu_seconds": time.process_time(), "cpu_seconds_per_update": watch.per_update()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
