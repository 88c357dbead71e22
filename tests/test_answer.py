"""The stochastic answer network, by itself and as a head of `--task smart_multitask` (--multitask-san)."""

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import make_place, prepare, write
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from multitask_runs import command, second_stage
from toolkit import (
    BOLD,
    HALF,
    HEAD,
    NO_DROPOUT,
    assert_close,
    assert_equal,
    assert_resumes,
    batch,
    build,
    error_line,
    refused,
    train,
    watch_terms,
)

from smart_fairseq import export
from smart_fairseq.commands import evaluate, predict
from smart_fairseq.errors import UsageError
from smart_fairseq.inference import Model
from smart_fairseq.method.answer import StepDropout, StochasticAnswer, average, texts
from smart_fairseq.method.divergence import squared_error, symmetric_kl

STILL = [*NO_DROPOUT, "--multitask-san-dropout", "0"]
SAN = ["--multitask-san", "RTE,STS-B", "--multitask-san-steps", "3", "--multitask-san-dropout", "0.4"]
TOKENS = torch.tensor([[0, 5, 6, 7, 2, 2, 8, 9, 2, 1], [0, 5, 2, 2, 8, 7, 9, 6, 5, 2]])
# where the texts of these rows stand
PLACES = [([1, 2, 3], [6, 7]), ([1], [4, 5, 6, 7, 8])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official files in glue/, and a data folder of each task in bins/."""
    return make_place(tmp_path_factory.mktemp("place"), ())


def make_head(outputs: int, steps: int = 3, dropout: float = 0.0, step_dropout: float = 0.0) -> StochasticAnswer:
    """For 4 channels, float64; all weights are of size 1 or so."""
    torch.manual_seed(5)
    settings: Any = {"steps": steps, "dropout": dropout, "step_dropout": step_dropout}
    head = StochasticAnswer(4, outputs, **settings, end=2, special=(0, 1, 2)).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    return head


def answer(head: StochasticAnswer, features: torch.Tensor, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    head.note(None, (tokens,))
    return head(features)  # type: ignore[no-any-return]


def features_of(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randn(rows, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


# --- the mathematics -------------------------------------------------------------------------------


def by_hand(head: StochasticAnswer, states: np.ndarray, first: list[int], second: list[int]) -> list[np.ndarray]:
    """The outputs of each step for one row, [T, C], written with loops from the papers' equations."""
    w = {name: parameter.detach().numpy() for name, parameter in head.named_parameters()}
    size = states.shape[1]

    def summed(scores: list[float], places: list[int]) -> np.ndarray:
        shares = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
        return sum(share * states[place] for share, place in zip(shares, places))  # type: ignore[no-any-return]

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))  # type: ignore[no-any-return]

    s = summed([float(w["summary.weight"][0] @ states[j]) for j in second], second)
    found = []
    for _ in range(head.steps):
        scores = [float(sum(w["attention.weight"][c] @ s * states[i][c] for c in range(size))) for i in first]
        x = summed(scores, first)
        of_x = [w["dense.weight"][g * size :][:size] @ x + w["dense.bias"][g * size :][:size] for g in range(3)]
        of_s = [w["state.weight"][g * size :][:size] @ s + w["state.bias"][g * size :][:size] for g in range(3)]
        r, z = sigmoid(of_x[0] + of_s[0]), sigmoid(of_x[1] + of_s[1])
        s = (1 - z) * np.tanh(of_x[2] + r * of_s[2]) + z * s
        seen = np.concatenate([s, x, abs(s - x), s * x])
        found.append(w["out_proj.weight"] @ seen + w["out_proj.bias"])
    return found


@pytest.mark.parametrize("outputs", [3, 1])
def test_against_loops_over_the_papers_equations(outputs: int) -> None:
    head, features = make_head(outputs), features_of()
    found = answer(head, features)
    for row, (first, second) in enumerate(PLACES):
        steps = by_hand(head, features[row].numpy(), first, second)
        if outputs == 1:
            expected = np.mean(steps, axis=0)
        else:
            shares = [np.exp(step) / np.exp(step).sum() for step in steps]
            assert abs(shares[0] - shares[-1]).max() > 1e-3  # the steps differ
            expected = np.log(np.mean(shares, axis=0))
        assert_close(found[row], torch.from_numpy(expected))


def test_the_cell_is_torchs_gru() -> None:
    head = make_head(3)
    cell = torch.nn.GRUCell(4, 4).double()
    parts = (head.dense.weight, head.state.weight, head.dense.bias, head.state.bias)
    for name, value in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), parts):
        getattr(cell, name).data.copy_(value)
    state, x = features_of()[:, 0], features_of()[:, 1]
    assert_close(head._gru(state, x), cell(x, state))


def test_padding_other_rows_and_tokens_around_change_nothing() -> None:
    """Whatever the states there are; and the answer does depend on every token of the texts."""
    head, features = make_head(3), features_of()
    expected = answer(head, features)
    longer = torch.cat([features, 9 * features_of(2, 3)], dim=1)
    assert_close(answer(head, longer, torch.nn.functional.pad(TOKENS, (0, 3), value=1)), expected)
    for row, (first, second) in enumerate(PLACES):
        assert_close(answer(head, features[row : row + 1], TOKENS[row : row + 1])[0], expected[row])
        for token in range(10):
            moved = features.clone()
            moved[row, token] += 1
            found = answer(head, moved)
            assert_equal(found[1 - row], expected[1 - row])
            assert torch.equal(found[row], expected[row]) is (token not in first + second)


def test_a_text_that_was_cut_away_leaves_finite_numbers() -> None:
    """The summary of nothing is 0, whatever the padding holds."""
    head, features = make_head(3), features_of()
    for tokens in (torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 2, 2, 7, 2]])):
        length = tokens.shape[1]
        expected = answer(head, features[:1, :length], tokens)
        assert expected.isfinite().all()
        padded = torch.nn.functional.pad(tokens, (0, 10 - length), value=1)
        assert_close(answer(head, features[:1], padded), expected)


def test_stochastic_prediction_dropout() -> None:
    """Whole steps go, at the share that was asked for, never all; the mean over draws is the answer of all steps."""
    torch.manual_seed(1)
    outputs = torch.randn(1, 4, 3, dtype=torch.float64).expand(20000, 4, 3)
    dropout = StepDropout(0.4)
    kept = dropout(outputs)
    assert kept.any(dim=1).all()
    # of 4 at 0.4 all go in 0.0256 of the rows, which then keep one
    assert abs(kept.double().mean() - (0.6 + 0.0256 / 4)) < 0.01
    assert ((kept.sum(1) == 1).double().mean() - (4 * 0.6 * 0.4**3 + 0.0256)).abs() < 0.01
    everything = torch.ones_like(kept)
    assert_close(average(outputs, kept).exp().mean(0), average(outputs, everything)[0].exp(), rtol=0, atol=0.01)
    assert average(outputs, kept).exp().std(0).min() > 0.05
    assert_close(average(outputs, kept).exp().sum(1), torch.ones(20000).double())
    numbers = outputs[..., :1]
    assert_close(average(numbers, kept).mean(0), numbers[0].mean(0), rtol=0, atol=0.02)
    assert_equal(dropout.eval()(outputs), everything)


def test_dropout_is_of_training_alone() -> None:
    head, features = make_head(3, dropout=0.3, step_dropout=0.5), features_of()
    assert not torch.equal(answer(head, features), answer(head, features))
    expected = answer(make_head(3), features)
    for _ in range(2):
        assert_equal(answer(head.eval(), features), expected)


def test_answers_are_finite_where_probabilities_are_not() -> None:
    """Of a class that is e^-1000, in half precision too; float32 comes out."""
    outputs = torch.tensor([[[1000.0, 0.0], [900.0, 0.0]]], dtype=torch.float16, requires_grad=True)
    found = average(outputs, torch.tensor([[True, True]]))
    assert found.dtype == torch.float32
    assert_close(found, torch.tensor([[0.0, -900 - math.log(2)]]))
    found.sum().backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()


def test_a_head_without_its_encoders_pass_says_so() -> None:
    head, features = make_head(3), features_of()
    answer(head, features)
    with pytest.raises(RuntimeError, match="without the pass of the encoder"):
        head(features)  # not once more by what it knows from before
    with pytest.raises(RuntimeError, match="without the pass of the encoder"):
        answer(head, features[:, 1:])


# --- as a head of smart_multitask ------------------------------------------------------------------


def louder(model: Any) -> None:
    """At initialisation a head hardly reacts to anything."""
    for head in model.classification_heads.values():
        torch.nn.init.normal_(head.out_proj.weight, std=1.0)


def test_only_the_named_tasks_have_it(place: Path) -> None:
    flags = [*SAN, "--multitask-dropout", "RTE=0.25"]
    _, _, model, _ = build(command(place / "bins", ["RTE", "MRPC", "STS-B", "CoLA"], *flags))
    heads = model.classification_heads
    assert {name for name, head in heads.items() if isinstance(head, StochasticAnswer)} == {"RTE", "STS-B"}
    assert heads["RTE"].out_proj.out_features == 2 and heads["STS-B"].out_proj.out_features == 1
    assert heads["RTE"].dropout.p == 0.25 and heads["RTE"].step_dropout.p == 0.4 and heads["RTE"].steps == 3


def test_a_copy_of_the_model_is_whole(place: Path) -> None:
    """Its head hears from its own encoder, as of an average of the weights (--store-ema)."""
    _, task, model, _ = build(command(place / "bins", ["RTE"], "--multitask-san", "RTE"))
    inputs = {**batch(task, 4)["net_input"], "features_only": True, "classification_head_name": "RTE"}
    twin = copy.deepcopy(model.eval())
    assert_equal(twin(**inputs)[0], model(**inputs)[0])
    assert twin.classification_heads["RTE"] is not model.classification_heads["RTE"]


def test_the_texts_of_prepared_rows(place: Path) -> None:
    """What the head reads of a batch are the tokens of input0 and of input1."""
    _, task, model, _ = build(command(place / "bins", ["RTE"], "--multitask-san", "RTE"))
    head, sample = model.classification_heads["RTE"], batch(task, 4)
    seen: list[Any] = []
    head.register_forward_pre_hook(lambda module, args: seen.append(module._tokens))
    model(**sample["net_input"], features_only=True, classification_head_name="RTE")
    inner = task.objectives[0].task
    for row, number in enumerate(sample["id"].tolist()):
        masks = texts(seen[0], head.end, head.special)
        for name, mask in zip(("input0", "input1"), masks):
            folder = place / "bins" / "RTE-bin" / name / "train"
            stored = data_utils.load_indexed_dataset(str(folder), inner.dictionary)[number]
            assert seen[0][row][mask[row]].tolist() == stored[:-1].tolist()


@pytest.mark.parametrize("mode", ["finite", "tangent"])
def test_smart_acts_through_it(mode: str, place: Path) -> None:
    """By hand from the outputs of two passes, for classes and for a regression; the term moves all of the head."""
    flags = [*STILL, *BOLD, "--multitask-san", "RTE,STS-B", "--smart-bregman-weight", "0", "--smart-mode", mode]
    _, task, model, criterion = build(command(place / "bins", ["RTE", "STS-B"], *flags))
    louder(model)
    seen = watch_terms(criterion)
    for name, first in (("STS-B", 30), ("RTE", 0)):
        sample = batch(task, 4, first)
        loss, _, log = criterion(model.train(), sample)
        with torch.no_grad():
            forward = criterion.forward_of(model, sample)
            clean, moved = forward(), forward(perturbation=seen[-1].perturbation)
        divergence = squared_error if name == "STS-B" else symmetric_kl
        assert log["smart_loss"] > 1e-9
        assert_close(log["smart_loss"], divergence(moved, clean).sum(), rtol=0.05 if mode == "tangent" else 1e-3)
        model.zero_grad()
        term = loss - log["task_loss"]  # whose gradient is the loss's less the task loss's
        assert_close(term.detach(), log["smart_loss"], rtol=1e-3)
        loss.backward()
        together = {key: p.grad.clone() for key, p in model.classification_heads[name].named_parameters()}
        model.zero_grad()
        criterion.weights["smart"] = 0.0
        criterion(model, sample)[0].backward()
        criterion.weights["smart"] = 1.0
        for key, parameter in model.classification_heads[name].named_parameters():
            if key != "out_proj.bias" or name == "RTE":  # a regression's does not change a difference
                assert not torch.equal(together[key], parameter.grad), key


DROPPED = ["--multitask-san", "RTE", "--multitask-san-dropout", "0.4", "--pooler-dropout", "0.2"]


def test_both_passes_have_the_same_masks(place: Path) -> None:
    """With all dropout on and next to no perturbation there is next to no divergence; with masks of their own much."""
    found = {}
    for masks in ("shared", "independent"):
        flags = [*DROPPED, "--smart-recipe", "paper", "--smart-epsilon", "1e-6", "--smart-noise-std", "1e-7"]
        flags += ["--smart-bregman-weight", "0", "--dropout", "0", "--attention-dropout", "0"]
        flags += ["--smart-mode", "finite", "--smart-dropout", masks]
        _, task, model, criterion = build(command(place / "bins", ["RTE"], *flags))
        louder(model)
        found[masks] = criterion(model.train(), batch(task, 4))[2]["smart_loss"].item()
    assert found["shared"] < 1e-6 and found["independent"] > 0.01, found


def test_forward_mode_products_go_through_it(place: Path) -> None:
    """With all dropout on, the change along a direction and the way back, against differences in float64."""
    _, task, model, criterion = build(command(place / "bins", ["RTE"], *DROPPED))
    louder(model)
    model.double().train()
    forward = criterion.forward_of(model, batch(task, 4))
    direction = torch.randn(*forward.inputs["src_tokens"].shape, 16, dtype=torch.float64)

    def outputs(size: float) -> torch.Tensor:
        torch.manual_seed(4)
        with torch.no_grad(), forward.encoder.lean(), forward.encoder.attention_written_out():
            return forward(perturbation=size * direction)

    torch.manual_seed(4)
    logits, change, pull_back = forward.products(forward.encoder.frozen_weights(), direction)
    assert_close(logits, outputs(0))
    difference = (outputs(1e-6) - outputs(-1e-6)) / 2e-6
    assert difference.abs().max() > 1e-3
    assert_close(change, difference, rtol=1e-5, atol=1e-7)
    cotangent = torch.randn_like(logits)
    assert_close((pull_back(cotangent) * direction).sum(), (cotangent * change).sum())


def write_toy(folder: Path) -> Path:
    """RTE's files, where the second text follows if it is about the dog."""
    draw = random.Random(3)
    for split, count in (("train", 96), ("dev", 40), ("test", 4)):
        lines = ["index\tsentence1\tsentence2" + ("" if split == "test" else "\tlabel")]
        for number in range(count):
            right = draw.random() < 0.5
            animal, other = ("the dog", "a cat") if right else ("a cat", "the dog")
            label = "" if split == "test" else "\t" + ("entailment" if right else "not_entailment")
            lines.append(f"{number}\tsee {draw.choice([animal, other])}\t{draw.choice(['', 'see '])}{animal}{label}")
        write(folder / "RTE" / f"{split}.tsv", *lines)
    return folder


def test_it_learns(place: Path, tmp_path: Path) -> None:
    """With SMART and the teacher, from chance to nearly all of the validation set."""
    prepare("RTE", write_toy(tmp_path / "glue"), place / "bpe", tmp_path / "bins" / "RTE-bin")
    flags = ["--multitask-san", "RTE", "--lr", "5e-3", "--batch-size", "16", *NO_DROPOUT]
    log = train(command(tmp_path / "bins", ["RTE"], *flags, max_update=60, validate=True))
    assert log["train_inner"][0]["task_loss"] > 0.6
    assert log["valid"][-1]["valid_RTE_accuracy"] > 95
    assert all(line["smart_loss"] > 0 for line in log["train_inner"])


@pytest.fixture(scope="module")
def run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The save folder of a run with teacher and SMART, resumed within its second epoch as if it had gone on."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*BOLD, *SAN, "--pooler-dropout", "0.1", "--batch-size", "8", "--save-interval-updates", "9"]
    arguments = command(place / "bins", ["RTE", "MRPC", "STS-B"], *flags, save_dir=folder, max_update=18)
    assert_resumes(arguments, folder, 9)
    return folder


def test_other_heads_than_the_checkpoints_are_named(run: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint_last.pt").write_bytes((run / "checkpoint_last.pt").read_bytes())
    tasks, other = ["RTE", "MRPC", "STS-B"], ["--multitask-san", "MRPC"]
    arguments = command(place / "bins", tasks, *other, save_dir=tmp_path, max_update=19)
    with pytest.raises(UsageError, match="as with other tasks, heads or another precision; resume with the same"):
        train(arguments)


def test_the_teacher_has_the_head(run: Path) -> None:
    state = torch.load(run / "checkpoint_last.pt")
    names = [name for name in state["model"] if not name.endswith(("version", "lm_head.weight"))]
    teacher = dict(zip(names, state["last_optimizer_state"]["mbpp"]["teacher"]))
    for part in ("attention.weight", "state.weight", "out_proj.weight"):
        name = f"classification_heads.RTE.{part}"
        assert teacher[name].shape == state["model"][name].shape
        assert not torch.equal(teacher[name], state["model"][name])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(precision: str, place: Path) -> None:
    flags = [*BOLD, *SAN, "--smart-epsilon", "5e-2", *(HALF if precision == "fp16" else [])]
    common = {"bf16": True} if precision == "bf16" else {}
    log = train(command(place / "bins", ["RTE", "STS-B"], *flags, max_update=4), **common)["train_inner"]
    assert len(log) == 4 and all(math.isfinite(line["loss"]) and line["smart_loss"] > 0 for line in log)


# --- a checkpoint with it --------------------------------------------------------------------------


def test_predict_and_evaluate_build_it_again(run: Path, place: Path, tmp_path: Path) -> None:
    """The logits of the model's own forward on each row, and the commands' exit."""
    last = run / "checkpoint_last.pt"
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(last)])
    task.load_dataset("valid")
    for name in ("RTE", "STS-B", "MRPC"):
        folder = place / "bins" / f"{name}-bin"
        found = Model(last, folder, cpu=True).predict("valid", 8192)
        (objective,) = [objective for objective in task.objectives if objective.name == name]
        data = objective.task.datasets["valid"]
        sample = data.collater([data[index] for index in range(len(data))])
        with torch.no_grad():
            expected = model.eval()(**sample["net_input"], features_only=True, classification_head_name=name)[0]
        assert_close(torch.from_numpy(found.logits).float()[sample["id"]], expected, atol=1e-5)
        flags = ["--data-dir", str(folder), "--checkpoint", str(last), "--cpu"]
        assert evaluate.main(flags) == 0
        assert predict.main([*flags, "--split", "valid", "--out", str(tmp_path / name)]) == 0


def test_another_folder_of_the_same_classes(place: Path, tmp_path: Path) -> None:
    """AX is MNLI's, whose head goes by the name of the folder's task; the folder it was trained on may be gone."""
    flags = ["--multitask-san", "MNLI"]
    train(command(place / "bins", ["MNLI", "RTE"], *flags, save_dir=tmp_path, max_update=1))
    state = torch.load(tmp_path / "checkpoint_last.pt")
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    torch.save(state, tmp_path / "moved.pt")
    found = Model(tmp_path / "moved.pt", place / "bins" / "AX-bin", cpu=True).predict("test", 8192)
    assert len(found.labels) == 9 and np.isfinite(found.logits).all()


def test_export_refuses_it_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last, out = str(run / "checkpoint_last.pt"), tmp_path / "plain.pt"
    for more in ([], ["--teacher"], ["--format", "huggingface"]):
        line = error_line("export", export.main, [last, out, "--task", "RTE", *more], capsys)
        assert "the head of RTE is a stochastic answer network (--multitask-san); fairseq and" in line
        assert not out.exists()
    assert export.main([last, str(out), "--task", "MRPC"]) == 0  # fairseq's head
    settings = torch.load(out)["cfg"]["task"]
    assert not [name for name in settings if name.startswith("multitask")]


def test_a_damaged_head_is_named(run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(run / "checkpoint_last.pt")
    del state["model"]["classification_heads.RTE.state.bias"]
    torch.save(state, tmp_path / "damaged.pt")
    flags = ["--data-dir", str(place / "bins" / "RTE-bin"), "--checkpoint", str(tmp_path / "damaged.pt"), "--cpu"]
    assert "has no state.bias of its classification head 'RTE'" in error_line("evaluate", evaluate.main, flags, capsys)
    with pytest.raises(UsageError, match=r"has no state\.bias of"):
        checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "damaged.pt")])


def test_the_second_stage_starts_with_a_new_head(run: Path, place: Path, tmp_path: Path) -> None:
    """--task sentence_prediction has no such head; the encoder comes along."""
    start = torch.load(run / "checkpoint_last.pt")["model"]
    for head in (HEAD, "RTE"):
        end = second_stage(run, place / "bins" / "RTE-bin", tmp_path / head, head)
        assert end[f"classification_heads.{head}.dense.weight"].shape == (16, 16)
        name = "encoder.sentence_encoder.layers.1.fc1.weight"
        assert_close(end[name], start[name])


def test_flags_that_do_not_fit(place: Path) -> None:
    def said(*flags: str) -> str:
        return refused(command(place / "bins", ["RTE", "CoLA", "STS-B"], *flags))

    allowed = "; it must be of the tasks of pairs, RTE, STS-B (no ranking, no single texts)"
    assert f"--multitask-san is 'CoLA'{allowed}" in said("--multitask-san", "RTE,CoLA")
    assert f"--multitask-san is 'MRPC'{allowed}" in said("--multitask-san", "MRPC")
    assert "--multitask-san-steps is 0; it must be 1 or more" in said("--multitask-san-steps", "0")
    assert "--multitask-san-dropout is 1.0; it must be a share from 0 to below 1" in said(
        "--multitask-san-dropout", "1"
    )
    assert "--spectral-norm-classification-head is set with --multitask-san" in said(
        "--multitask-san", "RTE", "--spectral-norm-classification-head"
    )
