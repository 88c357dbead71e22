"""`--wnli-hnn`: candidates scored by LM head and similarity together; equations, batches, SMART's term, end to end."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import DEVICE, NO_DROPOUT, assert_close, batch, capture_log, refused, train, watch_terms
from wnli_samples import assert_worst, command, prepared, set_up, table

from smart_fairseq.commands import evaluate, predict
from smart_fairseq.data.binarize import read_indexed, read_manifest
from smart_fairseq.method.candidates import ABSENT
from smart_fairseq.method.hybrid import hybrid_loss, hybrid_scores, similarities
from smart_fairseq.training.candidates import HYBRID, judge_hybrid

HNN = "--wnli-hnn"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("wnli"))


# --- the equations ---------------------------------------------------------------------------------


def literal_similarity(states: torch.Tensor, pronoun: int, candidate: range, w1: torch.Tensor, w2: torch.Tensor) -> Any:
    """s of one row, [T, C], word by word as the module's docstring has it."""
    query = w1 @ states[0]
    logits = [float(query @ states[i]) / math.sqrt(states.shape[1]) for i in candidate]
    shares = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
    v = sum((a * states[i] for a, i in zip(shares, candidate)), torch.zeros(states.shape[1], dtype=states.dtype))
    return (w2 @ v) @ states[pronoun]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_similarity_is_that_of_the_equations(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64).to(dtype)
    w1, w2 = (torch.randn(4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    places = [(2, range(4, 6)), (1, range(3, 4)), (3, range(4, 7))]  # one candidate begins next to the pronoun
    marked = torch.zeros(3, 7, dtype=torch.bool)
    for row, (pronoun, candidate) in enumerate(places):
        marked[row, [pronoun, *candidate]] = True
    found = similarities(states, marked, lambda x: x @ w1.T, lambda x: x @ w2.T)
    exact = [literal_similarity(states[row].double(), *places[row], w1.double(), w2.double()) for row in range(3)]
    assert_close(found.to(dtype), torch.stack(exact))


def test_loss_is_that_of_the_equations() -> None:
    """Of a group with two right and two wrong candidates all four pairs count; one without a pair has no loss."""
    generator = torch.Generator().manual_seed(4)
    logs = -3 * torch.rand(2, 4, generator=generator, dtype=torch.float64)
    s = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 1, 0], [1, -1, -1, 1]])
    scores = hybrid_scores(logs, s, 10.0)

    def pair(c: int, a: int) -> float:
        def sigmoid(x: float) -> float:
            return 1 / (1 + math.exp(-x))

        score = [(math.exp(float(logs[0, k])) + sigmoid(float(s[0, k]))) / 2 for k in range(4)]
        similarity = (-math.log(sigmoid(float(s[0, c]))) - math.log(sigmoid(-float(s[0, a])))) / 2
        ranking = math.log(1 + math.exp(10.0 * (score[a] + 0.6 - score[c])))
        return -float(logs[0, c]) + similarity + ranking

    expected = sum(pair(c, a) for c in (0, 2) for a in (1, 3)) / 4
    assert_close(hybrid_loss(scores, logs, s, labels, 0.6, 10.0), torch.tensor([expected, 0.0], dtype=torch.float64))
    assert hybrid_scores(torch.tensor([[0.0, ABSENT]]), torch.tensor([[0.0, 99.0]]), 10.0).tolist() == [[7.5, ABSENT]]


# --- what is in a batch, and what the model makes of it --------------------------------------------


def rows_of(data: Path) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """From the files alone, of each row of train: the tokens before, pronoun, candidate, and those after."""
    found = []
    for texts in zip(*(read_indexed(data / f"input{place}" / "train") for place in range(4))):
        text, before, until, pronoun = (row.tolist()[:-1] for row in texts)
        found.append((before, pronoun[len(before) :], until[len(before) :], text[len(until) :]))
    return found


@pytest.mark.parametrize("bpe, separators", [("gpt2", 2), ("bert", 1)])
def test_a_batch_has_for_each_candidate_the_sentence_with_its_pronoun_and_the_candidate_behind(
    data: Path, tmp_path: Path, bpe: str, separators: int
) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(data, folder)
    (folder / "preprocess.json").write_text(json.dumps({**read_manifest(folder), "bpe": bpe}))
    task, _, _ = set_up(folder, HNN)
    sample = batch(task, 3)
    groups, count, length = sample["net_input"]["candidates"].shape
    assert count == 4
    tokens = sample["net_input"]["src_tokens"].view(groups, count, length)
    marked, pad = sample["net_input"]["candidates"], task.source_dictionary.pad()
    for number, group, place in sample["rows"].tolist():
        before, pronoun, candidate, after = rows_of(data)[number]
        assert pronoun
        row = [0, *before, *pronoun, *after, *[2] * separators, *candidate, 2]
        at = 2 + place
        assert tokens[group, at].tolist() == [*row, *[pad] * (length - len(row))]
        start = len(row) - len(candidate) - 1
        expected = {1 + len(before): pronoun[0], **{start + i: token for i, token in enumerate(candidate)}}
        assert {i: t for i, t in enumerate(marked[group, at].tolist()) if t != pad} == expected
        assert sample["net_input"]["src_lengths"].view(groups, count)[group, at] == len(row)


def test_the_models_scores_are_those_of_each_row_in_a_pass_of_its_own(data: Path) -> None:
    task, model, _ = set_up(data, HNN)
    model.eval()
    head, mask = model.classification_heads[HYBRID], task.source_dictionary.index("<mask>")
    torch.nn.init.normal_(head.out_proj.weight)
    sample = batch(task, 9)
    with torch.no_grad():
        found = model(**sample["net_input"], features_only=True, classification_head_name=HYBRID)[0]
        for number, group, place in sample["rows"].tolist():
            before, pronoun, candidate, after = rows_of(data)[number]
            masked = torch.tensor([[0, *before, *[mask] * len(candidate), *after, 2]], device=DEVICE)
            span = slice(1 + len(before), 1 + len(before) + len(candidate))
            logits = model(masked)[0][0, span].double().log_softmax(-1)
            log_p = logits.gather(1, torch.tensor(candidate, device=DEVICE)[:, None]).mean()
            pair = torch.tensor([[0, *before, *pronoun, *after, 2, 2, *candidate, 2]], device=DEVICE)
            states = model(pair, features_only=True)[0][0].double()
            end = pair.shape[1] - 1
            weights = head.dense.weight.double(), head.out_proj.weight.double()
            s = literal_similarity(
                states.cpu(), 1 + len(before), range(end - len(candidate), end), *(w.cpu() for w in weights)
            )
            expected = 10 * (log_p.exp().cpu() + torch.sigmoid(s)) / 2
            assert found[group, place].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.std() > 0.01


# --- SMART -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["finite", "tangent"])
def test_the_term_is_the_divergence_of_the_groups_shares_and_moves_both_kinds_of_rows(data: Path, mode: str) -> None:
    sizes = ["--smart-epsilon", "1e-3", "--smart-noise-std", "1e-4", "--smart-steps", "2", "--smart-step-size", "1e-2"]
    task, model, criterion = set_up(data, HNN, "--smart-mode", mode, *sizes, "--smart-weight", "1")
    torch.nn.init.normal_(model.classification_heads[HYBRID].out_proj.weight, std=0.3)
    terms, sample = watch_terms(criterion), batch(task, 5)
    loss, size, log = criterion(model, sample)
    (term,) = terms
    assert size == 5
    assert term.perturbation is not None
    assert log["smart_delta"].item() == pytest.approx(5 * 1e-3, rel=1e-4)  # a group has one ball
    real = sample["net_input"]["src_tokens"].ne(task.source_dictionary.pad()).view(5, 4, -1)
    moved = term.perturbation.view(5, 4, real.shape[2], -1).abs().amax(-1) > 0
    assert bool((moved == real).all())  # the rows of the language model and of the similarity

    assert_worst(model, sample, term, HYBRID)
    loss.backward()
    head = model.classification_heads[HYBRID]
    for weight in (head.dense.weight, head.out_proj.weight, model.encoder.lm_head.dense.weight):
        assert bool(weight.grad.any())


def test_groups_of_different_sizes_do_not_disturb_each_other(data: Path) -> None:
    task, model, _ = set_up(data, HNN)
    group = task.dataset("train").groups[1]
    third = next(iter(group.labels))
    group.labels[(*third, *third)] = 0  # of one more candidate
    apart = [judge_hybrid(model, batch(task, 1, start), 0.6, 10.0)[0].item() for start in (0, 1)]
    together = batch(task, 2)
    assert together["target"].tolist()[0][2] == -1
    assert judge_hybrid(model, together, 0.6, 10.0)[0].item() == pytest.approx(sum(apart), rel=1e-5)


# --- end to end ------------------------------------------------------------------------------------


def test_training_ranks_the_right_candidates_first(data: Path) -> None:
    flags = [*NO_DROPOUT, HNN, "--smart-weight", "0", "--no-shuffle", "--lr", "3e-3"]
    lines = train(command(data, *flags, updates=80))["train_inner"]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["accuracy"] == 100


@pytest.mark.parametrize(
    "arch, common", [("roberta", {}), ("roberta", {"bf16": True}), ("smart_bert", {})], ids=["float32", "bf16", "bert"]
)
def test_from_training_to_the_submission_file(data: Path, tmp_path: Path, arch: str, common: dict[str, Any]) -> None:
    flags = [HNN, "--arch", arch]
    log = train(command(data, *flags, save_dir=tmp_path, updates=6), **common)
    assert all(line["smart_loss"] > 0 and line["bregman_loss"] >= 0 for line in log["train_inner"])
    assert log["train_inner"][-1]["bregman_loss"] > 0
    options = ["--checkpoint", str(tmp_path / "checkpoint_best.pt"), "--data-dir", str(data), "--cpu"]
    assert predict.main([*options, "--out", str(tmp_path)]) == 0
    submission = table(tmp_path / "WNLI.tsv")[1:]
    assert [sorted(row[1] for row in submission[start : start + 2]) for start in (0, 2)] == [["0", "1"]] * 2
    assert evaluate.main(options) == 0
    # goes on where it was, by another run
    more = train(command(data, *flags, save_dir=tmp_path, updates=8), **common)["train_inner"]
    assert [line["num_updates"] for line in more] == [7, 8]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--wnli-alpha", "5"], "--wnli-alpha is 5.0 with --wnli-hnn"),
        (["--wnli-beta", "0.1"], "--wnli-beta is 0.1 with --wnli-hnn"),
        (["--wnli-hnn-gamma", "0"], "--wnli-hnn-gamma is 0"),
        (["--wnli-hnn-beta", "-1"], "--wnli-hnn-beta is -1"),
    ],
)
def test_flags_that_do_not_fit_are_named(data: Path, flags: list[str], words: str) -> None:
    assert words in refused(command(data, HNN, *flags))


def test_data_without_pronouns_serve_the_language_model_alone(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    shutil.copytree(data, folder)
    shutil.rmtree(folder / "input3")  # as preprocess wrote them before it knew HNN
    assert len(train(command(folder, updates=1))["train_inner"]) == 1
    assert "holds no pronouns, which --wnli-hnn needs; run preprocess again" in refused(command(folder, HNN))


def test_a_bert_with_a_pooler_starts_hnn(data: Path, tmp_path: Path) -> None:
    """The pooler is the start of fairseq's heads alone: HNN's W_1 is another layer, though of the same size."""
    flags = ["--arch", "smart_bert"]
    train(command(data, *flags, save_dir=tmp_path / "bert", updates=1))
    encoder = tmp_path / "bert" / "checkpoint_last.pt"
    state = torch.load(encoder)
    state["model"] |= {"pooler.weight": torch.ones(16, 16), "pooler.bias": torch.ones(16)}
    torch.save(state, encoder)
    start = ["--finetune-from-model", str(encoder), "--lr", "1e-9"]
    with capture_log() as log:
        train(command(data, HNN, *flags, *start, save_dir=tmp_path / "hnn", updates=1))
    said = [str(line) for line in log["text"]]
    assert not [line for line in said if "starts from BERT's pooler" in line or "shared parameter: classif" in line]
    weight = torch.load(tmp_path / "hnn" / "checkpoint_last.pt")["model"]["classification_heads.hnn.dense.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_margins_checkpoint_starts_hnn_and_not_the_other_way_round(data: Path, tmp_path: Path) -> None:
    for name, flags in {"margin": [], "hnn": [HNN]}.items():
        train(command(data, *flags, save_dir=tmp_path / name, updates=1))
    start = ["--finetune-from-model", str(tmp_path / "margin" / "checkpoint_last.pt")]
    assert len(train(command(data, HNN, *start, updates=1))["train_inner"]) == 1
    with capture_log() as log:
        train(command(data, "--finetune-from-model", str(tmp_path / "hnn" / "checkpoint_last.pt"), updates=1))
    assert any("hnn" in str(line) and "not present" in str(line) for line in log["text"])
