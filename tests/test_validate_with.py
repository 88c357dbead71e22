"""The averaged weights: to validate with during training, and as a checkpoint of their own."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from processes import finish, start
from toolkit import HALF, HEAD, NO_DROPOUT, assert_close, assert_equal, batch, build, command, train, write_data

from smart_fairseq.errors import UsageError
from smart_fairseq.export import main

# a teacher that lags behind a student in a hurry
LAGGING = [*NO_DROPOUT, "--lr", "1e-2", "--mbpp-momentum", "0.9", "--mbpp-warmup-ratio", "0"]


def judged(checkpoint: Path, data: Path) -> tuple[float, float]:
    """Accuracy in percent and cross entropy in bits over the validation set, in float32."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], {"data": str(data)})
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    sample = dataset.collater([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        logits, _ = models[0].eval()(**sample["net_input"], classification_head_name=HEAD)
    loss = torch.nn.functional.cross_entropy(logits, sample["target"].view(-1)) / torch.log(torch.tensor(2.0))
    return 100 * float((logits.argmax(1) == sample["target"].view(-1)).float().mean()), float(loss)


def validated(log: dict[str, Any]) -> tuple[float, float]:
    return log["valid"][-1]["valid_accuracy"], log["valid"][-1]["valid_loss"]


@pytest.mark.parametrize("precision", [pytest.param([], marks=pytest.mark.slow), HALF], ids=["fp32", "fp16"])
def test_validation_with_the_teacher_is_that_of_the_exported_teacher(precision: Any, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", valid=50)
    results = {}
    for who in ("student", "teacher"):
        arguments = command(
            data, *LAGGING, *precision, "--smart-validate-with", who,
            save_dir=tmp_path / who, max_update=12, validate=True,
        )  # fmt: skip
        results[who] = validated(train(arguments))
    last = tmp_path / "teacher" / "checkpoint_last.pt"
    assert main([str(last), str(tmp_path / "out.pt"), "--teacher"]) == 0
    assert main([str(last), str(tmp_path / "student.pt")]) == 0
    rounding = 1.5e-3 if precision else 6e-4
    for who, checkpoint in (("teacher", "out.pt"), ("student", "student.pt")):
        accuracy, loss = judged(tmp_path / checkpoint, data)
        assert results[who][1] == pytest.approx(loss, abs=rounding)
        assert results[who][0] == pytest.approx(accuracy, abs=2.01 if precision else 0.051)
    # they differ, so that neither could stand in for the other
    assert abs(results["student"][1] - results["teacher"][1]) > 2 * rounding
    exported = torch.load(tmp_path / "out.pt")["model"]
    held = torch.load(last)["last_optimizer_state"]["mbpp"]["teacher"]
    tied = exported.keys() - {"encoder.lm_head.weight"}
    assert sum(exported[n].numel() for n in tied if not n.endswith("version")) == sum(t.numel() for t in held)
    embeddings = exported["encoder.sentence_encoder.embed_tokens.weight"]
    assert_close(embeddings.flatten(), held[0].flatten()[: embeddings.numel()])


def test_a_flat_teacher(class_data: Path, tmp_path: Path) -> None:
    """--fp16 keeps the teacher as one flat tensor (with a GPU; here it is made of the others)."""
    train(command(class_data, save_dir=tmp_path, max_update=2))
    state = torch.load(tmp_path / "checkpoint_last.pt")
    own = state["last_optimizer_state"]["mbpp"]
    flat = copy.deepcopy(state)
    flat["last_optimizer_state"]["mbpp"]["teacher"] = [torch.cat([tensor.flatten() for tensor in own["teacher"]])]
    torch.save(flat, tmp_path / "flat.pt")
    assert main([str(tmp_path / "checkpoint_last.pt"), str(tmp_path / "one.pt"), "--teacher"]) == 0
    assert main([str(tmp_path / "flat.pt"), str(tmp_path / "other.pt"), "--teacher"]) == 0
    one, other = (torch.load(tmp_path / name)["model"] for name in ("one.pt", "other.pt"))
    assert one.keys() == other.keys() == state["model"].keys()
    for name in one:
        assert_equal(one[name], other[name])


@pytest.mark.slow
def test_two_workers_validate_with_the_teacher(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", valid=23)
    arguments = command(
        data, *LAGGING, "--smart-validate-with", "teacher", "--ddp-backend", "legacy_ddp",
        "--best-checkpoint-metric", "loss", save_dir=tmp_path / "run", max_update=6, validate=True,
    )  # fmt: skip
    finish(start(arguments, tmp_path / "run", workers=2), tmp_path / "run")
    last = tmp_path / "run" / "checkpoint_last.pt"
    assert main([str(last), str(tmp_path / "out.pt"), "--teacher"]) == 0
    logged = torch.load(last)["extra_state"]["val_loss"]
    assert logged == pytest.approx(judged(tmp_path / "out.pt", data)[1], abs=6e-4)


def test_it_needs_mbpp(class_data: Path) -> None:
    with pytest.raises(UsageError, match=r"--smart-validate-with is teacher but --optimizer is adam; .* mbpp"):
        build(command(class_data, "--smart-validate-with", "teacher", optimizer="adam"))


def test_without_an_optimizer_it_is_the_student(class_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in fairseq-validate; said once."""
    _, task, model, criterion = build(command(class_data, "--smart-validate-with", "teacher"))
    _, _, plain = build(command(class_data))[1:]
    sample = batch(task, 4)
    model.eval()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        losses = [criterion(model, sample)[0] for _ in range(2)]
        assert_close(losses[0], plain(model, sample)[0])
    assert sum("no optimizer here" in record.message for record in caplog.records) == 1


def test_no_teacher_to_export(class_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adam = tmp_path / "adam"
    train(command(class_data, optimizer="adam", save_dir=adam, max_update=1))
    assert main([str(adam / "checkpoint_last.pt"), str(tmp_path / "out.pt"), "--teacher"]) == 2
    message = capsys.readouterr().err
    assert "holds no teacher" in message and "--optimizer mbpp" in message and message.count("\n") == 1
    train(command(class_data, save_dir=tmp_path / "mbpp", max_update=1))
    state = torch.load(tmp_path / "mbpp" / "checkpoint_last.pt")
    broken = copy.deepcopy(state)
    broken["last_optimizer_state"]["mbpp"]["teacher"].pop()
    torch.save(broken, tmp_path / "broken.pt")
    assert main([str(tmp_path / "broken.pt"), str(tmp_path / "out.pt"), "--teacher"]) == 2
    assert "do not fit" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
