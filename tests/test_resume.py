"""Through fairseq-train: stopping and resuming, resetting, and what plain fairseq makes of a checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import BOLD, ROOT, assert_equal, command, train

import smart_fairseq  # noqa: F401  allow-lists what checkpoints hold


def tensors(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by their path."""
    if torch.is_tensor(state):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {key: value for name, part in items for key, value in tensors(part, f"{path}/{name}").items()}


@pytest.mark.parametrize("base", ["adam", "radam"])
def test_three_and_three_equal_six(base: str, class_data: Path, tmp_path: Path) -> None:
    """Weights, optimizer and teacher bit for bit, dropout on, the stop in the middle of an epoch."""
    flags = [*BOLD, "--mbpp-base", base, "--mbpp-warmup-ratio", "0.5", "--save-interval-updates", "3"]
    train(command(class_data, *flags, save_dir=tmp_path / "straight"))
    stopped = tmp_path / "stopped"
    train(command(class_data, *flags, save_dir=stopped))
    (stopped / "checkpoint_last.pt").unlink()
    first_half = stopped / "checkpoint_1_3.pt"
    assert torch.load(first_half)["optimizer_history"][-1]["num_updates"] == 3
    first_half.rename(stopped / "checkpoint_last.pt")
    resumed = train(command(class_data, *flags, save_dir=stopped))
    assert [line["num_updates"] for line in resumed["train_inner"]] == [4, 5, 6]
    ends = [torch.load(folder / "checkpoint_last.pt") for folder in (tmp_path / "straight", stopped)]
    for part in ("model", "last_optimizer_state"):
        straight, after = (tensors(end[part]) for end in ends)
        assert straight.keys() == after.keys() and len(straight) > 30
        for name in straight:
            assert_equal(straight[name], after[name])
    teacher = ends[0]["last_optimizer_state"]["mbpp"]
    assert teacher["updates"] == 6
    assert all(average.dtype == torch.float32 for average in teacher["teacher"])


def test_reset_optimizer_starts_the_teacher_at_the_loaded_weights(class_data: Path, tmp_path: Path) -> None:
    """theta~ starts at the pretrained weights, which the checkpoint brings, not at random ones."""
    train(command(class_data, save_dir=tmp_path / "pretraining", max_update=4))
    pretrained = tmp_path / "pretraining" / "checkpoint_last.pt"
    reset = ["--restore-file", str(pretrained), "--reset-optimizer", "--reset-dataloader", "--reset-meters"]
    train(command(class_data, *reset, "--mbpp-momentum", "1", save_dir=tmp_path / "tuning", max_update=2))
    before = torch.load(pretrained)["model"]
    state = torch.load(tmp_path / "tuning" / "checkpoint_last.pt")
    assert state["last_optimizer_state"]["mbpp"]["updates"] == 2
    held = state["last_optimizer_state"]["mbpp"]["teacher"]
    assert_equal(held[0], before["encoder.sentence_encoder.embed_tokens.weight"])
    assert not torch.equal(held[0], state["model"]["encoder.sentence_encoder.embed_tokens.weight"])


def test_finetune_from_model(class_data: Path, tmp_path: Path) -> None:
    """fairseq's other way to start from a checkpoint, and to go on from checkpoint_last.pt by the same command."""
    train(command(class_data, save_dir=tmp_path / "pretraining", max_update=2))
    again = command(
        class_data, "--finetune-from-model", str(tmp_path / "pretraining" / "checkpoint_last.pt"),
        save_dir=tmp_path / "tuning", max_update=2,
    )  # fmt: skip
    assert len(train(again)["train_inner"]) == 2
    assert len(train([*again, "--max-update", "3"])["train_inner"]) == 1


def test_saving_without_optimizer_state(class_data: Path, tmp_path: Path) -> None:
    train(command(class_data, "--no-save-optimizer-state", save_dir=tmp_path, max_update=2))
    assert "last_optimizer_state" not in torch.load(tmp_path / "checkpoint_last.pt")


def test_best_metrics_of_numpy_load_with_the_safe_loader(class_data: Path, tmp_path: Path) -> None:
    """Matthews' correlation reaches the checkpoint as a number of numpy."""
    arguments = command(
        class_data, "--report-mcc", "--best-checkpoint-metric", "mcc", "--maximize-best-checkpoint-metric",
        save_dir=tmp_path, max_update=6,
    )  # fmt: skip
    arguments.remove("--disable-validation")
    first = train(arguments)
    assert "valid_mcc" in first["valid"][0]
    train([*arguments, "--max-update", "12"])
    assert torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["extra_state"]["val_loss"] is not None


PLAIN = """
import argparse, sys, torch
torch.serialization.add_safe_globals([argparse.Namespace])  # what plain fairseq needs from torch 2.6 on
from fairseq.models.roberta import RobertaModel
folder, data, out = sys.argv[1:]
roberta = RobertaModel.from_pretrained(folder, "checkpoint_last.pt", data, bpe=None).eval()
tokens = torch.tensor([[0, 4, 5, 6, 2], [0, 9, 8, 2, 1]])
logits = roberta.predict("sentence_classification_head", tokens, return_logits=True)
assert not any(name.startswith("smart_fairseq") for name in sys.modules)
torch.save(logits.detach(), out)
"""


def test_plain_fairseq_loads_a_checkpoint_and_predicts_the_same(class_data: Path, tmp_path: Path) -> None:
    from fairseq import checkpoint_utils

    train(command(class_data, save_dir=tmp_path, max_update=4))
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path), str(class_data), str(tmp_path / "logits.pt")],
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "checkpoint_last.pt")])
    tokens = torch.tensor([[0, 4, 5, 6, 2], [0, 9, 8, 2, 1]])
    logits, _ = models[0].eval()(tokens, classification_head_name="sentence_classification_head")
    assert_equal(torch.load(tmp_path / "logits.pt"), logits.detach())


def test_fairseq_validate(class_data: Path, tmp_path: Path) -> None:
    """The criterion is rebuilt from the checkpoint, whose --restore-file is long gone."""
    start = tmp_path / "start.pt"
    train(command(class_data, save_dir=tmp_path / "first", max_update=2))
    (tmp_path / "first" / "checkpoint_last.pt").rename(start)
    train(
        command(class_data, "--restore-file", str(start), "--reset-optimizer", save_dir=tmp_path / "run", max_update=4)
    )
    start.unlink()
    run = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "fairseq-validate"), str(class_data), "--user-dir", "smart_fairseq"),
            *("--path", str(tmp_path / "run" / "checkpoint_last.pt"), "--task", "sentence_prediction", "--cpu"),
            *("--valid-subset", "valid", "--batch-size", "4", "--num-classes", "2", "--init-token", "0"),
            *("--criterion", "smart_sentence_prediction"),
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "accuracy" in run.stdout + run.stderr
