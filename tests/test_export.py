"""export: plain fairseq, in a process that never imports this package, predicts the same."""

import argparse
import functools
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from hf_samples import fine_tuning, write_hf, write_task_data
from toolkit import ROOT, error_line, train

from smart_fairseq.convert.checkpoint import plain
from smart_fairseq.convert.epsilon import scale_residual_stream, stream_scale
from smart_fairseq.export import main
from smart_fairseq.import_hf import import_hf

TOKENS = [[0, 5, 9, 12, 7, 2], [0, 6, 2, 1, 1, 1], [0, 8, 8, 10, 2, 1]]

# what a user of plain fairseq runs; prints features, and the logits of the head or of the LM head
PLAIN_FAIRSEQ = """
import json, sys, logging
logging.disable(logging.CRITICAL)
import torch
from fairseq.models.roberta import RobertaModel
for line in sys.stdin:
    folder, file, data, head, tokens = json.loads(line)
    hub = RobertaModel.from_pretrained(folder, checkpoint_file=file, data_name_or_path=data, bpe=None)
    hub.eval()
    tokens = torch.tensor(tokens)
    with torch.no_grad():
        features = hub.extract_features(tokens)
        logits = hub.predict(head, tokens, return_logits=True) if head else hub.model(tokens)[0]
    assert not any(name.split(".")[0] == "smart_fairseq" for name in sys.modules)
    assert type(hub.model) is RobertaModel
    print("RESULT" + json.dumps([features.tolist(), logits.tolist()]), flush=True)
"""
InPlainFairseq = Callable[..., list[torch.Tensor]]


@pytest.fixture(scope="module")
def in_plain_fairseq() -> Iterator[InPlainFairseq]:
    """A function of file, data and head; one process, which takes seconds to start, answers all."""
    command = [sys.executable, "-c", PLAIN_FAIRSEQ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdin is not None and process.stdout is not None

    def ask(file: Path, data: Path, head: str = "") -> list[torch.Tensor]:
        print(json.dumps([str(file.parent), file.name, str(data), head, TOKENS]), file=process.stdin, flush=True)
        said = ""
        for line in process.stdout:
            if line.startswith("RESULT"):
                return [torch.tensor(part) for part in json.loads(line.removeprefix("RESULT"))]
            said += line
        raise AssertionError(said)

    yield ask
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def here(file: Path, head: str = "", **overrides: Any) -> list[torch.Tensor]:
    models, _ = checkpoint_utils.load_model_ensemble([str(file)], {"load_checkpoint_heads": True, **overrides})
    model = models[0].eval()
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        features = model(tokens, features_only=True)[0]
        logits = model.classification_heads[head](features) if head else model(tokens)[0]
    return [features, logits]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    import_hf(write_hf(folder / "hf", "bert", head=True), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def trained(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few updates of SMART on the imported model, and the data it saw."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_task_data(folder / "data", imported / "dict.txt")
    train(fine_tuning(data, imported, folder / "run", "--lr", "1e-3", "--max-update", "4"))
    return {"checkpoint": folder / "run" / "checkpoint_last.pt", "data": data}


HEAD = "sentence_classification_head"


def test_trained_model_predicts_the_same_without_this_package(
    trained: dict[str, Path], in_plain_fairseq: InPlainFairseq, tmp_path: Path
) -> None:
    out = tmp_path / "plain.pt"
    assert main([str(trained["checkpoint"]), str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pt"]
    expected = here(trained["checkpoint"], HEAD)
    for actual, wanted in zip(in_plain_fairseq(out, trained["data"], HEAD), expected):
        assert (actual - wanted).abs().max() < 1e-5


@pytest.mark.slow
def test_as_a_program_it_does_the_same(trained: dict[str, Path], tmp_path: Path) -> None:
    """A program registers what the checkpoint needs by itself."""
    outs = [tmp_path / "here.pt", tmp_path / "program.pt"]
    command = [sys.executable, "-m", "smart_fairseq.commands", "export", str(trained["checkpoint"]), str(outs[1])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith(f"export: wrote {outs[1]}") and not done.stderr
    assert main([str(trained["checkpoint"]), str(outs[0])]) == 0
    here, there = (torch.load(out, weights_only=True) for out in outs)
    assert here["cfg"] == there["cfg"] and list(here["model"]) == list(there["model"])
    assert all(torch.equal(tensor, there["model"][name]) for name, tensor in here["model"].items())


def test_without_the_scale_it_would_not(trained: dict[str, Path], tmp_path: Path) -> None:
    """The effect that the test above rests on: fairseq's epsilon moves these logits by far more than 1e-5."""
    state = torch.load(trained["checkpoint"], weights_only=True)
    vars(state["cfg"]["model"])["smart_layer_norm_eps"] = 1e-5
    torch.save(state, tmp_path / "naive.pt")
    _, expected = here(trained["checkpoint"], HEAD)
    _, naive = here(tmp_path / "naive.pt", HEAD)
    assert (naive - expected).abs().max() > 1e-4


def test_nothing_of_this_package_remains(trained: dict[str, Path], tmp_path: Path) -> None:
    """The pickle names no class, flag or component of ours, and holds no optimizer state."""
    out = tmp_path / "plain.pt"
    main([str(trained["checkpoint"]), str(out)])
    with zipfile.ZipFile(out) as archive:
        (pickle,) = (archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    for word in (b"smart_", b"mbpp", b"SmartS", b"MBPP", b"argparse", b"omegaconf"):
        assert word not in pickle, word
    state = torch.load(out, weights_only=True)
    assert state["last_optimizer_state"] is None
    assert state["optimizer_history"][-1]["num_updates"] == 4
    assert state["cfg"]["model"]["arch"] == state["cfg"]["model"]["_name"] == "roberta"
    assert state["cfg"]["criterion"]["_name"] == "sentence_prediction"
    assert state["cfg"]["criterion"]["classification_head_name"] == HEAD
    assert state["cfg"]["optimizer"]["_name"] == "adam"


def test_imported_model_keeps_features_and_nearly_the_lm_head(
    imported: Path, in_plain_fairseq: InPlainFairseq, tmp_path: Path
) -> None:
    """Features within 1e-5. The LM head's LayerNorm keeps fairseq's epsilon, no more than that changes.

    The token type within the embeddings adds the same number to all logits of a token, which no probability sees.
    """
    (tmp_path / "plain.pt").touch()
    assert main([str(imported / "model.pt"), str(tmp_path / "plain.pt"), "--overwrite"]) == 0
    features, logits = in_plain_fairseq(tmp_path / "plain.pt", imported)
    data = {"data": str(imported)}
    expected_features, expected_logits = here(imported / "model.pt", **data)
    assert (features - expected_features).abs().max() < 1e-5

    models, _ = checkpoint_utils.load_model_ensemble([str(imported / "model.pt")], data)
    models[0].encoder.lm_head.layer_norm.eps = 1e-5
    with torch.no_grad():
        with_fairseqs_epsilon = models[0].eval()(torch.tensor(TOKENS))[0]
    logits = logits.log_softmax(-1)
    assert (logits - with_fairseqs_epsilon.log_softmax(-1)).abs().max() < 1e-4
    assert (logits - expected_logits.log_softmax(-1)).abs().max() < 1e-2


def test_roberta_keeps_its_weights(tmp_path: Path) -> None:
    import_hf(write_hf(tmp_path / "hf", "roberta"), tmp_path / "in")
    assert main([str(tmp_path / "in" / "model.pt"), str(tmp_path / "plain.pt")]) == 0
    before, after = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("in/model.pt", "plain.pt"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_half_precision_weights_become_float32(
    imported: Path, in_plain_fairseq: InPlainFairseq, tmp_path: Path
) -> None:
    state = torch.load(imported / "model.pt", weights_only=True)
    state["model"] = {key: tensor.half() for key, tensor in state["model"].items()}
    torch.save(state, tmp_path / "half.pt")
    assert main([str(tmp_path / "half.pt"), str(tmp_path / "plain.pt")]) == 0
    written = torch.load(tmp_path / "plain.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    features, _ = in_plain_fairseq(tmp_path / "plain.pt", imported)
    expected, _ = here(tmp_path / "half.pt", data=str(imported))
    assert (features - expected).abs().max() < 1e-5


def test_scale() -> None:
    """sqrt(1e-5 / 1e-12) = 3162 = 2^11.6: 2^12, and 1e-5 / 2^24 = 6.0e-13. Larger epsilons are met exactly."""
    assert stream_scale(1e-12) == 4096
    assert stream_scale(1e-5) == 1
    for eps in (1e-6, 1e-8, 1e-3):
        assert 1e-5 / stream_scale(eps) ** 2 == pytest.approx(eps)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_other_epsilons(tmp_path: Path, eps: float) -> None:
    import_hf(write_hf(tmp_path / "hf", "bert", layer_norm_eps=eps), tmp_path / "in")
    assert main([str(tmp_path / "in" / "model.pt"), str(tmp_path / "plain.pt")]) == 0
    features, _ = here(tmp_path / "plain.pt", data=str(tmp_path / "in"))
    expected, _ = here(tmp_path / "in" / "model.pt", data=str(tmp_path / "in"))
    assert (features - expected).abs().max() < 1e-5


def test_scaling_is_exact_and_leaves_its_input(imported: Path) -> None:
    """Powers of two: scaling by s and then by 1/s gives back every bit."""
    model = torch.load(imported / "model.pt", weights_only=True)["model"]
    before = {key: tensor.clone() for key, tensor in model.items()}
    scaled = scale_residual_stream(model, 4096.0)
    changed = [key for key in model if not torch.equal(scaled[key], model[key])]
    assert all("layers.1.final_layer_norm" not in key for key in changed)
    # 2 tables, 2 of the first LayerNorm, per layer 4 + 2 weights and 2 biases, 4 and 2 of LayerNorms, 3 of the LM head
    assert len(changed) == 2 + 2 + 2 * (4 + 2 + 2) + 4 + 2 + 3
    back = scale_residual_stream(scaled, 1 / 4096)
    for key, tensor in before.items():
        assert torch.equal(model[key], tensor) and torch.equal(back[key], tensor), key


def test_plain_containers() -> None:
    from fairseq.dataclass import ChoiceEnum

    choice = ChoiceEnum(["no_c10d", "other"])
    given = argparse.Namespace(a=(1, 2.5), b={"c": None, 3: True}, d=choice("other"))
    assert plain(given) == {"a": [1, 2.5], "b": {"c": None, "3": True}, "d": "other"}
    assert type(plain(given)["d"]) is str


# Errors


run_refused = functools.partial(error_line, "export", main)


def test_errors_are_one_line_and_leave_nothing(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = imported / "model.pt", str(tmp_path / "out.pt")
    assert "no such file" in run_refused([str(tmp_path / "none.pt"), out], capsys)
    (tmp_path / "cut.pt").write_bytes(source.read_bytes()[:1000])
    assert "cut.pt: not a readable checkpoint" in run_refused([str(tmp_path / "cut.pt"), out], capsys)
    torch.save({"model": {}}, tmp_path / "bare.pt")
    assert "no configuration" in run_refused([str(tmp_path / "bare.pt"), out], capsys)

    state = torch.load(source, weights_only=True)
    state["cfg"]["model"].update(_name="bart_large", arch="bart_large")
    torch.save(state, tmp_path / "bart.pt")
    line = run_refused([str(tmp_path / "bart.pt"), out], capsys)
    assert "architecture is bart_large; allowed: those of smart_bert and roberta" in line
    state["cfg"]["model"].update(_name="smart_bert", encoder_normalize_before=True)
    torch.save(state, tmp_path / "prenorm.pt")
    assert "--encoder-normalize-before" in run_refused([str(tmp_path / "prenorm.pt"), out], capsys)

    assert "is CHECKPOINT itself" in run_refused([str(source), str(source)], capsys)
    assert "existing folder" in run_refused([str(source), str(tmp_path / "none" / "out.pt")], capsys)
    assert "existing folder" in run_refused([str(source), str(tmp_path)], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"cut.pt", "bare.pt", "bart.pt", "prenorm.pt"}


def test_interrupted_writing_keeps_the_old_file(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: Any, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos") from OSError(28, "No space left on device")

    (tmp_path / "out.pt").write_text("old")
    monkeypatch.setattr("torch.save", full)
    source, out = str(imported / "model.pt"), str(tmp_path / "out.pt")
    assert "exists already; choose another OUT.pt or give --overwrite" in run_refused([source, out], capsys)
    line = run_refused([source, out, "--overwrite"], capsys)
    assert f"{tmp_path / 'out.pt'}: cannot be written (No space left on device); nothing was kept" in line
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.pt", "old")]
