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
from ..inference import Model
from .attacked import Attack, attacked
from .rows import Source

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


def main(out: Path, beside: Mapping[str, Any], arguments: list[str]) -> None:
    """Train, predict, attack, store: ``out`` is there whole or not at all.

    beside: whether to ``keep`` the checkpoint, the ``seed``, an `Attack`'s values or None as ``attack``, and folders by
        name as ``transfer``.
    """
    leave_with_parent()
    os.nice(NICENESS)
    save_dir = Path(arguments[arguments.index("--save-dir") + 1])
    shutil.rmtree(save_dir, ignore_errors=True)  # of a run that was cut off: fairseq would go on from there
    try:
        said = _train_and_store(out, beside, arguments, save_dir / "checkpoint_last.pt")
    finally:
        if not beside["keep"]:
            shutil.rmtree(save_dir, ignore_errors=True)
    logger.info(json.dumps(said))


def predicted(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """(logits [N, K], labels [N]) of the valid split."""
    labels = Source(model.folder).labels("valid")
    logits = model.predict("valid", MAX_TOKENS).logits.astype(np.float32)
    return logits, labels.astype(np.float32) if model.task.regression else labels


def _train_and_store(
    out: Path, beside: Mapping[str, Any], arguments: list[str], checkpoint: Path
) -> dict[str, int | float]:
    """Rows and processor time, for the log."""
    watch, data = train(arguments), Path(arguments[0])
    model = Model(checkpoint, data, cpu="--cpu" in arguments)
    logits, labels = predicted(model)
    stored: dict[str, Any] = {"logits": logits, "labels": labels}
    if beside["attack"]:
        stored |= attacked(Attack(**beside["attack"]), beside["seed"], model, logits, labels)
    rows = {"rows": len(labels)}
    for name, folder in beside["transfer"].items():
        logits, labels = predicted(model.on(Path(folder)))
        stored |= {f"logits_on_{name}": logits, f"labels_on_{name}": labels}
        rows[f"rows_on_{name}"] = len(labels)
    with whole_file(out) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **stored)
    return {**rows, "cpu_seconds": time.process_time(), "cpu_seconds_per_update": watch.per_update()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
