"""One run of a study, as a process of its own: fairseq-train, then the logits of the valid split.

    python -m smart_fairseq.study.worker LOGITS.npz {keep,delete} FAIRSEQ_TRAIN_FLAGS...

The checkpoint is deleted once the logits are there, unless it is to be kept. The process ends with the one that
started it, even if that was killed.
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


def predict(checkpoint: Path, data: str) -> tuple[np.ndarray, np.ndarray]:
    """(logits [N, K], labels [N]) of the valid split, in the order of its rows."""
    import torch
    from fairseq import checkpoint_utils

    overrides = {"data": data, "no_shuffle": True}
    (model,), config, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides=overrides)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.common.cpu else "cpu")
    model.to(device).eval()
    head = config.criterion.get("classification_head_name") or "sentence_classification_head"
    dataset: Any = task.load_dataset("valid")
    logits = np.zeros((len(dataset), config.task.num_classes), dtype=np.float32)
    labels = np.zeros(len(dataset), dtype=np.float32 if config.task.regression_target else np.int64)
    with torch.inference_mode():
        for batch in batches(np.asarray(dataset.sizes[0]), MAX_TOKENS):
            sample = dataset.collater([dataset[place] for place in batch])
            inputs = {name: value.to(device) for name, value in sample["net_input"].items()}
            found, _ = model(**inputs, features_only=True, classification_head_name=head)
            logits[batch] = found.float().cpu().numpy()
            labels[batch] = sample["target"].reshape(-1).numpy()
    return logits, labels


def main(out: Path, keep: bool, arguments: list[str]) -> None:
    """Train, predict, store: ``out`` is there whole or not at all."""
    leave_with_parent()
    os.nice(NICENESS)
    allow_fairseq_checkpoints()
    save_dir = Path(arguments[arguments.index("--save-dir") + 1])
    shutil.rmtree(save_dir, ignore_errors=True)  # of a run that was cut off: fairseq would go on from there
    watch = train(arguments)
    logits, labels = predict(save_dir / "checkpoint_last.pt", arguments[0])
    if not np.isfinite(logits).all():
        sys.exit(f"{int((~np.isfinite(logits)).any(1).sum())} rows have no finite logits: the training diverged")
    with whole_file(out) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, logits=logits, labels=labels)
    if not keep:
        shutil.rmtree(save_dir)
    facts = {"rows": len(labels), "cpu_seconds": time.process_time(), "cpu_seconds_per_update": watch.per_update()}
    logger.info(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "keep", sys.argv[3:])
