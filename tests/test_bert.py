"""smart_bert is BERT: token types and pooler, single texts and pairs; what a checkpoint without them stays."""

from pathlib import Path
from typing import Any

import pytest
import toolkit
import torch
from fairseq import checkpoint_utils
from hf_samples import (
    BERT_TOKENS,
    fairseq_ids,
    in_transformers,
    load,
    needs_transformers,
    pooled,
    reference,
    write_hf,
    write_task_data,
)
from processes import assert_same_run, finish, start
from safetensors.torch import load_file, save_file
from toolkit import BOLD, HEAD, STEADY, USER_DIR, assert_same_state, capture_log, set_back, train

from smart_fairseq.export import main
from smart_fairseq.import_hf import import_hf
from smart_fairseq.models.smart_bert import in_second_text

TYPES = "encoder.sentence_encoder.token_types"
EMBEDDINGS = "encoder.sentence_encoder.embed_tokens.weight"
# texts in BERT's ids: a single one, two pairs, one of them with an empty text
TEXTS = [([6, 8, 11, 20],), ([20, 21, 7], [9, 18, 19]), ([22], [])]


def joined(*texts: list[int]) -> tuple[list[int], list[int]]:
    """[CLS] a [SEP] b [SEP], and a 1 for each token behind the first [SEP]: Devlin et al. (2019), figure 2."""
    first, *rest = texts
    ids, types = [3, *first, 4], [0] * (len(first) + 2)
    for second in rest:
        ids, types = [*ids, *second, 4], [*types, *[1] * (len(second) + 1)]
    return ids, types


def as_batch(rows: list[list[int]], padding: int) -> torch.Tensor:
    width = max(map(len, rows)) + 2
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows])


def outputs(hub: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of TEXTS, padded, and pooled outputs by a head that is registered now."""
    dictionary = hub.task.source_dictionary
    rows = [fairseq_ids(torch.tensor([joined(*row)[0]]), BERT_TOKENS, dictionary, "bert")[0].tolist() for row in TEXTS]
    hub.register_classification_head("new", num_classes=3)
    with torch.no_grad():
        hidden = hub.extract_features(as_batch(rows, dictionary.pad()))
        return hidden, torch.tanh(hub.model.classification_heads["new"].dense(hidden[:, 0]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf", "bert")


@pytest.fixture(scope="module")
def imported(source: Path) -> Path:
    import_hf(source, source.parent / "imported")
    return source.parent / "imported"


@pytest.fixture(scope="module")
def old(imported: Path) -> Path:
    """The same encoder as it was imported before there were token types: the first one within the embeddings."""
    state = torch.load(imported / "model.pt", weights_only=True)
    model = state["model"]
    model[EMBEDDINGS] = model["encoder.lm_head.weight"] = model[EMBEDDINGS] + model.pop(TYPES)[0]
    for part in ("weight", "bias"):
        del model[f"pooler.{part}"]
    folder = imported.parent / "old"
    folder.mkdir()
    for name in ("dict.txt", "import.json"):
        (folder / name).write_bytes((imported / name).read_bytes())
    torch.save(state, folder / "model.pt")
    return folder


def arguments(imported: Path, data: Path, run: Path, *flags: str) -> list[str]:
    return [
        *(str(data), "--user-dir", USER_DIR, "--task", "sentence_prediction", "--num-classes", "2"),
        *("--init-token", "0", "--arch", "smart_bert", "--encoder-layers", "2", "--encoder-embed-dim", "16"),
        *("--encoder-ffn-embed-dim", "40", "--encoder-attention-heads", "4", "--max-positions", "24"),
        *("--finetune-from-model", str(imported / "model.pt"), "--criterion", "smart_sentence_prediction", *BOLD),
        *("--optimizer", "mbpp", "--lr", "1e-3", "--batch-size", "4", "--max-update", "4", "--cpu", "--seed", "5"),
        *("--num-workers", "0", "--disable-validation", "--save-dir", str(run), "--no-epoch-checkpoints"),
        *("--log-format", "json", "--log-interval", "1", "--required-batch-size-multiple", "1", *flags),
    ]


# The same as BERT


def test_the_second_text_begins_behind_the_first_separator() -> None:
    """[CLS] a [SEP] b [SEP] as 0 a 2 b 2, padding 1: of two texts, of one, of two empty ones, of none that ends."""
    tokens = torch.tensor([[0, 5, 2, 6, 7, 2], [0, 5, 6, 2, 1, 1], [0, 2, 2, 1, 1, 1], [0, 5, 6, 7, 8, 9]])
    expected = [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert in_second_text(tokens, 2).int().tolist() == expected


def test_hidden_states_and_pooled_outputs_are_those_of_the_published_architecture(source: Path, imported: Path) -> None:
    """Of a padded batch, each row without its padding."""
    hidden, found = outputs(load(imported))
    for place, texts in enumerate(TEXTS):
        ids, types = (torch.tensor([part]) for part in joined(*texts))
        expected = reference(source, ids, types=types)
        assert (hidden[place, : ids.size(1)].double() - expected[0]).abs().max() < 1e-5
        assert (found[place].double() - pooled(source, expected)[0]).abs().max() < 1e-5
        if len(texts) == 2:  # the effect that this rests on
            assert (reference(source, ids) - expected).abs().max() > 1e-2


TRANSFORMERS = """
from transformers import AutoModel
ids, types, mask = (torch.tensor(part) for part in asked["batch"])
model, report = AutoModel.from_pretrained(asked["folder"], output_loading_info=True)
assert not any(report.values()), report
with torch.no_grad():
    out = model.eval()(input_ids=ids, token_type_ids=types, attention_mask=mask)
found = {"hidden": out.last_hidden_state.tolist(), "pooled": out.pooler_output.tolist()}
"""


@needs_transformers
def test_hidden_states_and_pooled_outputs_are_those_of_transformers(source: Path, imported: Path) -> None:
    """Of the folder that was imported; a padded batch, each row without its padding."""
    ids, types = zip(*(joined(*texts) for texts in TEXTS))
    batch = [as_batch([*ids], 0), as_batch([*types], 0), as_batch([[1] * len(row) for row in ids], 0)]
    asked = {"folder": str(source), "batch": [part.tolist() for part in batch]}
    theirs = {name: torch.tensor(part) for name, part in in_transformers(TRANSFORMERS, asked, source).items()}
    hidden, found = outputs(load(imported))
    assert (found - theirs["pooled"]).abs().max() < 1e-5
    for place, row in enumerate(ids):
        assert (hidden[place] - theirs["hidden"][place])[: len(row)].abs().max() < 1e-5


@pytest.mark.parametrize("count", [1, 3])
def test_other_numbers_of_token_types(tmp_path: Path, count: int) -> None:
    """Of three, two texts have two; one is within the embeddings."""
    source = write_hf(tmp_path / "hf", "bert", type_vocab_size=count)
    tensors = load_file(source / "model.safetensors")
    name = "embeddings.token_type_embeddings.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name].flip(0)])[:count]
    save_file(tensors, source / "model.safetensors")
    notes = import_hf(source, tmp_path / "out")["notes"]
    assert f"token types: {'the first 2 of 3' if count == 3 else 'the model goes without'}" in notes
    hub = load(tmp_path / "out")
    assert (TYPES in hub.model.state_dict()) is (count == 3)
    hidden, _ = outputs(hub)
    for place, texts in enumerate(TEXTS):
        ids, types = (torch.tensor([part]) for part in joined(*texts))
        expected = reference(source, ids, types=types if count == 3 else 0)
        assert (hidden[place, : ids.size(1)].double() - expected[0]).abs().max() < 1e-5


# Training


def test_pairs_train_both_token_types_and_the_pooler(imported: Path, tmp_path: Path) -> None:
    """The terms act; a resumed run ends in the same weights, optimizer and teacher, bit for bit."""
    data = write_task_data(tmp_path / "data", imported / "dict.txt", pairs=True)
    run = arguments(imported, data, tmp_path / "run", "--save-interval-updates", "3")
    log = train(run)
    assert all(line["smart_loss"] > 1e-6 for line in log["train_inner"])
    assert sum("starts from BERT's pooler" in str(line) for line in log["text"]) == 1
    start = torch.load(imported / "model.pt", weights_only=True)["model"]
    last = tmp_path / "run" / "checkpoint_last.pt"
    end = torch.load(last, weights_only=True)["model"]
    assert (end[TYPES] - start[TYPES]).abs().min() > 1e-5
    moved = end[f"classification_heads.{HEAD}.dense.weight"] - start["pooler.weight"]
    assert 1e-5 < moved.abs().max() < 1e-2
    set_back(tmp_path / "run", "checkpoint_2_3.pt")
    assert not any("BERT's pooler" in str(line) for line in train(run)["text"])
    assert_same_state(last, last.with_name("straight.pt"))


def test_a_trained_head_does_not_start_anew(imported: Path, tmp_path: Path) -> None:
    """Nor does it by the pooler of a checkpoint that holds both; one of another width is left as it is."""
    state = torch.load(imported / "model.pt", weights_only=True)
    head = {"dense.weight": torch.ones(16, 16), "dense.bias": torch.ones(16)}
    head |= {"out_proj.weight": torch.ones(2, 16), "out_proj.bias": torch.ones(2)}
    state["model"].update({f"classification_heads.{HEAD}.{name}": tensor for name, tensor in head.items()})
    for name in ("dict.txt", "import.json"):
        (tmp_path / name).write_bytes((imported / name).read_bytes())
    torch.save(state, tmp_path / "model.pt")
    hub = load(tmp_path)
    assert all(torch.equal(hub.model.classification_heads[HEAD].state_dict()[name], head[name]) for name in head)
    hub.model.register_classification_head("narrow", num_classes=2, inner_dim=8)
    hub.model.register_classification_head("new", num_classes=2)
    assert hub.model.classification_heads["narrow"].dense.weight.shape == (8, 16)
    assert torch.equal(hub.model.classification_heads["new"].dense.weight, state["model"]["pooler.weight"])


def test_that_a_pooler_was_never_trained_is_said(imported: Path, tmp_path: Path) -> None:
    """Its biases are 0 then, as BERT initialises them; with one that is not, it counts as trained."""
    state = torch.load(imported / "model.pt", weights_only=True)
    for name in ("dict.txt", "import.json"):
        (tmp_path / name).write_bytes((imported / name).read_bytes())
    for bias in (0.0, 1e-3):
        state["model"]["pooler.bias"] = torch.tensor([0.0] * 15 + [bias])
        torch.save(state, tmp_path / "model.pt")
        with capture_log() as log:
            load(tmp_path).model.register_classification_head(HEAD, num_classes=2)
        (line,) = (line for line in log["text"] if "starts from BERT's pooler" in line)
        assert ("never trained" in line) == (bias == 0)


@pytest.mark.parametrize("flags", [[], ["--separator-token", "2"]])
def test_a_separator_too_many_is_said(flags: list[str], pair_data: Path) -> None:
    with capture_log() as log:
        toolkit.build(toolkit.command(pair_data, *flags))
    assert any("leave it out" in line for line in log["text"]) == bool(flags)


# Checkpoints without token types


def test_single_texts_are_as_they_were(imported: Path, old: Path) -> None:
    """Bit for bit; pairs are not, of which the old import knew the separators alone."""
    with capture_log() as log:
        before = outputs(load(old))[0]
    after = outputs(load(imported))[0]
    length = len(joined(*TEXTS[0])[0])
    assert torch.equal(before[0, :length], after[0, :length])
    assert (before[1] - after[1]).abs().max() > 1e-2
    assert sum("the checkpoint holds no token types" in str(line) for line in log["text"]) == 1


@pytest.mark.parametrize("pairs", [False, True])
def test_an_old_import_trains_on_without(old: Path, tmp_path: Path, pairs: bool) -> None:
    """Its checkpoints have its own parameters, teacher included, and resume bit for bit; plain fairseq holds them."""
    data = write_task_data(tmp_path / "data", old / "dict.txt", pairs=pairs)
    run = arguments(old, data, tmp_path / "run", "--save-interval-updates", "3")
    train(run)
    last = tmp_path / "run" / "checkpoint_last.pt"
    state = torch.load(last, weights_only=True)
    start = torch.load(old / "model.pt", weights_only=True)["model"]
    assert {name for name in state["model"] if not name.startswith("classification_heads.")} == start.keys()
    set_back(tmp_path / "run", "checkpoint_2_3.pt")
    train(run)
    assert_same_state(last, last.with_name("straight.pt"))
    assert main([str(last), str(tmp_path / "teacher.pt"), "--teacher"]) == 0
    assert torch.load(tmp_path / "teacher.pt", weights_only=True)["model"].keys() == state["model"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["imported", "old"])
def test_two_workers_equal_one(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """`legacy_ddp`, which has wrapped the model before a checkpoint without token types takes them away."""
    folder = request.getfixturevalue(kind)
    data = write_task_data(tmp_path / "data", folder / "dict.txt", pairs=True)
    processes = []
    for name, workers in (("one", 1), ("two", 2)):
        flags = [*STEADY, "--batch-size", str(8 // workers), "--smart-epsilon", "0.1", "--smart-step-size", "1"]
        processes += start(arguments(folder, data, tmp_path / name, *flags), tmp_path / name, workers)
    finish(processes, tmp_path / "two")
    assert_same_run(tmp_path, ["one", "two"], count=4)


# Plain fairseq


def test_plain_fairseq_holds_the_first_token_type(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of single texts predicts the same, and a line says what is lost; one of pairs is refused in one."""
    line = {}
    for pairs in (False, True):
        folder = tmp_path / str(pairs)
        data = write_task_data(folder / "data", imported / "dict.txt", pairs=pairs)
        train(arguments(imported, data, folder / "run"))
        capsys.readouterr()
        assert main([str(folder / "run" / "checkpoint_last.pt"), str(folder / "plain.pt")]) == (2 if pairs else 0)
        line[pairs] = "".join(capsys.readouterr()).strip()
    assert line[False].endswith("(float32 or bfloat16), without BERT's second token type, so for single texts")
    assert "was trained on pairs with BERT's two token types; plain fairseq cannot hold" in line[True]
    assert "\n" not in line[False] + line[True] and not (tmp_path / "True" / "plain.pt").exists()

    path = tmp_path / "True" / "run" / "checkpoint_last.pt"
    state = torch.load(path, weights_only=True)
    state["model"] = {name: weight for name, weight in state["model"].items() if "classification_heads" not in name}
    torch.save(state, path)
    assert main([str(path), str(tmp_path / "plain.pt")]) == 2
    assert "has no classification head" in capsys.readouterr().err  # which the other format would lack as well

    found = []
    for path in (tmp_path / "False" / "run" / "checkpoint_last.pt", tmp_path / "False" / "plain.pt"):
        (model,), _ = checkpoint_utils.load_model_ensemble([str(path)])
        with torch.no_grad():
            tokens = torch.tensor([[0, 5, 9, 12, 2], [0, 6, 2, 1, 1]])
            found.append(model.eval()(tokens, classification_head_name=HEAD)[0])
    assert (found[0] - found[1]).abs().max() < 1e-5
