"""Through fairseq-train: stopping and resuming, resetting, and what plain fairseq makes of a checkpoint."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from omegaconf import DictConfig, open_dict
from toolkit import BOLD, HEAD, ROOT, assert_equal, assert_resumes, assert_same_state, batch, command, train

import smart_fairseq  # noqa: F401  allow-lists what checkpoints hold


@pytest.mark.parametrize("more", [["--mbpp-base", "radam"], ["--amp"]], ids=" ".join)
def test_three_and_three_equal_six(more: list[str], class_data: Path, tmp_path: Path) -> None:
    """As test_every_criterion.py has it for adam; the checkpoint says what the teacher is."""
    flags = [*BOLD, *more, "--mbpp-warmup-ratio", "0.5", "--save-interval-updates", "3"]
    train(command(class_data, *flags, save_dir=tmp_path / "run"))
    last = tmp_path / "run" / "checkpoint_last.pt"
    last.rename(tmp_path / "straight.pt")
    (tmp_path / "run" / "checkpoint_1_3.pt").rename(last)
    assert torch.load(last)["optimizer_history"][-1]["num_updates"] == 3
    resumed = train(command(class_data, *flags, save_dir=tmp_path / "run"))
    assert [line["num_updates"] for line in resumed["train_inner"]] == [4, 5, 6]
    assert_same_state(last, tmp_path / "straight.pt")
    teacher = torch.load(last)["last_optimizer_state"]["mbpp"]
    assert teacher["updates"] == 6
    assert all(average.dtype == torch.float32 for average in teacher["teacher"])


def test_r4f_resumes_and_is_loaded(class_data: Path, tmp_path: Path) -> None:
    """The head's spectral norm and its vectors too; fairseq's tools load what was trained."""
    flags = ["--spectral-norm-classification-head", "--save-interval-updates", "3"]
    arguments = command(class_data, *flags, criterion="r3f_sentence_prediction", save_dir=tmp_path / "run")
    assert_resumes(arguments, tmp_path / "run", 3)
    last = tmp_path / "run" / "checkpoint_last.pt"
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(last)])
    name = f"classification_heads.{HEAD}.out_proj.weight_orig"
    assert_equal(model.state_dict()[name], torch.load(last)["model"][name])


def test_a_checkpoint_that_names_removed_flags_goes_on(class_data: Path, tmp_path: Path) -> None:
    """As the version that had these flags wrote it: training resumes, and fairseq's tools load it."""
    train(command(class_data, *BOLD, save_dir=tmp_path / "run", max_update=3))
    last = tmp_path / "run" / "checkpoint_last.pt"
    state = torch.load(last)
    saved = state["cfg"]["criterion"]
    removed = {"smart_reuse": True, "smart_search_layers": 2, "smart_bregman_every": 2, "smart_mode": "finite"}
    with open_dict(saved) if isinstance(saved, DictConfig) else contextlib.nullcontext():
        assert saved["smart_mode"] is not None and not {"smart_reuse", "smart_bregman_every"} & set(saved)
        saved.update(removed)
        del saved["smart_linear_search"]
    torch.save(state, last)
    log = train(command(class_data, *BOLD, save_dir=tmp_path / "run", max_update=5))
    assert [line["num_updates"] for line in log["train_inner"]] == [4, 5]
    assert torch.load(last)["last_optimizer_state"]["mbpp"]["updates"] == 5
    torch.save(state, last)
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(last)])
    criterion = task.build_criterion(cfg.criterion)  # as fairseq-validate does
    assert str(criterion.cfg.smart_mode) == "finite" and criterion.settings.adversary.radius == 1e-2
    task.load_dataset("train")
    loss, _, _ = criterion(models[0].eval(), batch(task, 4))
    assert torch.isfinite(loss)


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
        save_dir=tmp_path, max_update=6, validate=True,
    )  # fmt: skip
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
    train(command(class_data, save_dir=tmp_path, max_update=4))
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path), str(class_data), str(tmp_path / "logits.pt")],
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "checkpoint_last.pt")])
    tokens = torch.tensor([[0, 4, 5, 6, 2], [0, 9, 8, 2, 1]])
    logits, _ = models[0].eval()(tokens, classification_head_name=HEAD)
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
