"""Bad input: one clear line that names the flag or file, the value and what is allowed, before training starts.

Each case runs the real program, so that what is tested is what a user sees and the exit status.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, optim
from fairseq.models import BaseFairseqModel
from hostile_samples import CHECKPOINTS
from toolkit import build, capture_log, command, parse, set_up, train, write_data, write_labels

from smart_fairseq.encoder import encoder_of
from smart_fairseq.errors import UsageError, explain
from smart_fairseq.training.checks import check_model, check_start

FAIRSEQ_TRAIN = Path(sys.executable).parent / "fairseq-train"


def refusal(arguments: list[str]) -> str:
    """Run fairseq-train, which must stop before the first update with status 1 or 2; its last line on stderr."""
    run = subprocess.run([str(FAIRSEQ_TRAIN), *arguments], capture_output=True, text=True)
    assert run.returncode in (1, 2), run.stdout + run.stderr
    assert "train_inner" not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    return run.stderr.strip().splitlines()[-1]


def library_refusal(arguments: list[str]) -> str:
    """The same in this process, which is faster: the message that the program would print."""
    with capture_log() as log, pytest.raises(Exception) as caught:
        train(arguments)
    assert not log["train_inner"]
    line = explain(caught.value)
    assert line is not None and "\n" not in line, caught.value
    return line


CASES = [
    (["--smart-epsilon", "0"], "--smart-epsilon is 0.0; it must be above 0"),
    (["--smart-epsilon=-1e-5"], "--smart-epsilon is -1e-05; it must be above 0"),
    (["--smart-epsilon", "nan"], "--smart-epsilon is nan; it must be above 0"),
    (["--smart-recipe", "smart", "--smart-epsilon", "1.5"], "--smart-epsilon is 1.5; it must be at most 1, the size"),
    (["--smart-recipe", "smart", "--smart-epsilon", "0"], "--smart-epsilon is 0.0; it must be above 0"),
    (["--mbpp-recipe", "smart", "--max-update", "0", "--max-epoch", "1"], "--mbpp-recipe is smart, whose teacher reme"),
    (["--best-checkpoint-metric", "calibration_error"], "--best-checkpoint-metric is calibration_error, which needs"),
    (["--regression-target", "--num-classes", "1", "--smart-report-calibration"], "--smart-report-calibration is set"),
    (["--smart-noise-std", "0"], "--smart-noise-std is 0.0; it must be above 0"),
    (["--smart-step-size", "-1"], "--smart-step-size is -1.0; it must be above 0"),
    (["--smart-steps", "0"], "--smart-steps is 0; it must be 1 or more"),
    (["--smart-weight", "-1"], "--smart-weight is -1.0; it must be 0 or above"),
    (["--smart-mode", "tangent", "--smart-dropout", "off"], "--smart-mode is tangent, which does not know"),
    (["--smart-bregman-weight", "-1"], "--smart-bregman-weight is -1.0; it must be 0 or above"),
    (
        ["--optimizer", "adam", "--smart-bregman-weight", "1"],
        "--smart-bregman-weight is 1 but --optimizer is adam; a value above 0 needs --optimizer mbpp",
    ),
    (["--mbpp-momentum", "1.1"], "--mbpp-momentum is 1.1; it must be a number from 0 to 1"),
    (["--mbpp-momentum", "-0.1"], "--mbpp-momentum is -0.1; it must be a number from 0 to 1"),
    (["--mbpp-warmup-momentum", "2"], "--mbpp-warmup-momentum is 2.0; it must be a number from 0 to 1"),
    (["--mbpp-warmup-ratio", "-1"], "--mbpp-warmup-ratio is -1.0; it must be a number from 0 to 1"),
    (["--mbpp-inner-steps", "0"], "--mbpp-inner-steps is 0; it must be a whole number from 1"),
    (["--mbpp-base", "adamm"], "--mbpp-base is adamm; it must be one of adadelta"),
    (["--use-bmuf"], "--use-bmuf is set; it must be left out with --optimizer mbpp, which it would hide"),
    (["--zero-sharding", "os"], "--zero-sharding is os; it must be none with --optimizer mbpp"),
    (["--max-update", "0", "--max-epoch", "1"], "--mbpp-warmup-ratio is 0.1, a fraction of the updates"),
    (["--regression-target", "--num-classes", "2"], "--num-classes is 2; it must be 1 with --regression-target"),
    (["--regression-target", "--num-classes", "1", "--smart-divergence", "kl"], "--smart-divergence is kl with --regr"),
    (["--num-classes", "1"], "--num-classes is 1; it must be 2 or more"),
    (["--restore-file", "no/such/model.pt"], "--restore-file no/such/model.pt: no such file"),
    (["--best-checkpoint-metric", "mcc"], "--best-checkpoint-metric is mcc, which needs --report-mcc"),
    (["--lr-scheduler", "polynomial_decay"], "--total-num-update is not given; --lr-scheduler polynomial_decay needs"),
    (["--best-checkpoint-metric", "acuracy"], "--best-checkpoint-metric is acuracy; it must be one of loss, nll_loss"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "line"), CASES, ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_flags(flags: list[str], line: str, class_data: Path) -> None:
    assert library_refusal(command(class_data, *flags)).startswith(line)


@pytest.mark.parametrize("index", [0, pytest.param(26, marks=pytest.mark.slow)])
def test_the_program_prints_that_line_alone(index: int, class_data: Path) -> None:
    flags, line = CASES[index]
    assert refusal(command(class_data, *flags)).startswith("smart_fairseq: error: " + line)


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("--smart-recipe", "'smart', 'paper', 'release', 'sift'"),
        ("--mbpp-recipe", "'smart', 'paper'"),
        ("--pgd-recipe", "'relative', 'mnli', 'qnli', 'qqp', 'sst_2', 'cola', 'mrpc', 'sts_b'"),
        ("--freelb-recipe", "'relative', 'mnli', 'qnli', 'qqp', 'sst_2', 'cola', 'mrpc', 'sts_b', 'rte'"),
        ("--freeat-recipe", "'relative', 'mnli', 'qnli', 'qqp', 'sst_2', 'cola', 'mrpc', 'sts_b'"),
        ("--r3f-recipe", "'paper', 'rte'"),
        ("--rdrop-recipe", "'paper', 'mnli', 'qnli', 'qqp', 'sst_2', 'cola', 'mrpc', 'rte', 'sts_b'"),
        ("--smart-epsilon-unit", "'relative', 'absolute'"),
        ("--smart-norm", "'inf', 'l2'"),
        ("--smart-norm-scope", "'example', 'token'"),
        ("--smart-projection", "'ball', 'normalize'"),
        ("--smart-embedding", "'token', 'normalized', 'input'"),
        ("--smart-dropout", "'shared', 'independent', 'off'"),
        ("--smart-divergence", "'auto', 'sym_kl', 'kl', 'js', 'squared'"),
        ("--smart-mode", "'auto', 'finite', 'tangent'"),
        ("--smart-validate-with", "'student', 'teacher'"),
    ],
)
def test_unknown_choices(flag: str, choices: str, class_data: Path, capsys: Any) -> None:
    prefix = flag.split("-")[2]
    criterion = f"{'smart' if prefix == 'mbpp' else prefix}_sentence_prediction"
    with pytest.raises(SystemExit) as caught:
        parse(command(class_data, flag, "l3", criterion=criterion))
    assert caught.value.code == 2
    assert f"argument {flag}: invalid choice: 'l3' (choose from {choices})" in capsys.readouterr().err


def test_checkpoint_activations(class_data: Path, capsys: Any) -> None:
    """RoBERTa's command line has no such flag and argparse says so; a config file can still set it."""
    with pytest.raises(SystemExit):
        parse(command(class_data, "--checkpoint-activations"))
    assert "unrecognized arguments: --checkpoint-activations" in capsys.readouterr().err
    _, model, _ = set_up(class_data)
    check_model(encoder_of(model))
    model.args.checkpoint_activations = True
    with pytest.raises(UsageError, match=r"--checkpoint-activations is on; with a perturbation .* it must be off"):
        check_model(encoder_of(model))


def test_a_model_without_classification_heads(class_data: Path) -> None:
    arguments = command(class_data)
    arguments[arguments.index("roberta")] = "transformer"
    for flag in ("--max-positions",):
        del arguments[arguments.index(flag) : arguments.index(flag) + 2]
    line = library_refusal(arguments)
    assert line.startswith("--arch: ") and "has no classification heads" in line


def test_a_model_of_no_known_kind_is_told_what_to_implement(class_data: Path) -> None:
    """A model with classification heads whose insides nobody has named."""
    model = BaseFairseqModel()
    assert encoder_of(model).model is model
    with pytest.raises(UsageError) as caught:
        check_model(encoder_of(model))
    line = str(caught.value)
    assert line.startswith("--arch: BaseFairseqModel takes no perturbation") and "\n" not in line
    assert "a subclass of smart_fairseq.encoder.Encoder with fits and find_insides" in line
    assert "smart_fairseq.encoder.KINDS" in line


@pytest.mark.parametrize("flag", ["--smart-reuse", "--smart-bregman-every", "--smart-search-layers"])
def test_flags_that_are_gone(flag: str, class_data: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse(command(class_data, flag))
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def named(folder: Path, task: str) -> Path:
    """A data folder that says which task it holds."""
    write_data(folder)
    (folder / "preprocess.json").write_text(json.dumps({"task": task, "rows": {"train": 24, "valid": 10}}))
    return folder


def test_a_run_on_another_task_does_not_go_on(tmp_path: Path) -> None:
    """Nor is its checkpoint written over; the same task from another place goes on, and so does a start from it."""
    rte, save_dir = named(tmp_path / "rte", "RTE"), tmp_path / "run"
    train(command(rte, save_dir=save_dir, max_update=2))
    before = (save_dir / "checkpoint_last.pt").read_bytes()
    other = named(tmp_path / "mrpc", "MRPC")
    line = library_refusal(command(other, save_dir=save_dir, max_update=4))
    assert f"{save_dir}/checkpoint_last.pt, of a run on RTE ({rte}), and this one is on MRPC ({other})" in line
    assert (save_dir / "checkpoint_last.pt").read_bytes() == before
    start = ["--finetune-from-model", str(save_dir / "checkpoint_last.pt")]
    assert len(train(command(other, *start, save_dir=tmp_path / "other", max_update=1))["train_inner"]) == 1
    moved = named(tmp_path / "moved", "RTE")
    assert len(train(command(moved, save_dir=save_dir, max_update=4))["train_inner"]) == 2


def test_nor_does_one_on_other_classes_where_the_folders_name_no_task(tmp_path: Path) -> None:
    data, other, save_dir = write_data(tmp_path / "data"), write_data(tmp_path / "other"), tmp_path / "run"
    write_labels(other, "train", ["yes", "no"] * 12, last="no", words=("yes", "no"))
    train(command(data, save_dir=save_dir, max_update=2))
    line = library_refusal(command(other, save_dir=save_dir, max_update=4))
    assert f"of a run on the classes 1, 0 ({data}), and this one is on the classes yes, no ({other}); give" in line
    data.rename(tmp_path / "moved")
    assert len(train(command(tmp_path / "moved", save_dir=save_dir, max_update=4))["train_inner"]) == 2


def test_a_start_from_random_weights_and_a_missing_first_token_are_warned_of(class_data: Path, tmp_path: Path) -> None:
    def warned(*flags: str, first: bool = True, **more: Any) -> list[bool]:
        arguments = command(class_data, *flags, max_update=1, **more)
        if not first:
            place = arguments.index("--init-token")
            del arguments[place : place + 2]
        with capture_log() as log:
            train(arguments)
        said = "\n".join(map(str, log["text"]))
        return ["training starts from random weights" in said, "--init-token is not set" in said]

    assert warned(first=False, save_dir=tmp_path) == [True, True]
    assert warned("--finetune-from-model", str(tmp_path / "checkpoint_last.pt")) == [False, False]


def test_a_folder_of_data_folders_is_named_with_those_in_it(tmp_path: Path) -> None:
    named(tmp_path / "bins" / "RTE-bin", "RTE")
    line = library_refusal(command(tmp_path / "bins"))
    assert line.endswith("input0/dict.txt: no such file; give one of the folders in it: RTE-bin")


def test_more_classes_than_labels(class_data: Path) -> None:
    line = library_refusal(command(class_data, num_classes=3))
    assert line.startswith("--num-classes is 3; it must be 2, the number of labels in ")


def test_a_regression_folder_for_classes_and_the_other_way(class_data: Path, regression_data: Path) -> None:
    line = library_refusal(command(regression_data))
    assert line.endswith("no such file; if this is a regression task, give --regression-target --num-classes 1")
    line = library_refusal(command(class_data, "--regression-target", num_classes=1))
    assert "label/train.label: no such file" in line and line.endswith("train without --regression-target")


def test_a_folder_that_is_not_there(class_data: Path) -> None:
    line = library_refusal(command(class_data / "typo"))
    assert "typo/input0/dict.txt: no such file; name a folder that" in line


def test_finetune_from_a_missing_model(class_data: Path) -> None:
    line = library_refusal(command(class_data, "--finetune-from-model", "gone.pt"))
    assert line == "--finetune-from-model gone.pt does not exist; name an existing checkpoint"


def test_finetune_from_a_folder(class_data: Path, tmp_path: Path) -> None:
    line = library_refusal(command(class_data, "--finetune-from-model", str(tmp_path)))
    assert line.startswith(f"--finetune-from-model {tmp_path}: a folder, ") and line.endswith("such as its model.pt")


def test_a_folder_without_a_part(class_data: Path, tmp_path: Path) -> None:
    line = library_refusal(command(class_data, "--train-subset", "gone"))
    assert line == f"{class_data}/input0/gone: no such part in the data folder; name another folder"
    shutil.copytree(class_data, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*/valid.*"):
        path.unlink()
    line = library_refusal(command(tmp_path, validate=True))
    assert line.endswith(
        "input0/valid: no such part in the data folder; name another folder, or train without it by "
        "--disable-validation"
    )


def test_an_encoder_in_the_place_of_a_checkpoint(class_data: Path) -> None:
    """fairseq-validate builds its task, masked_lm, which looks for a dictionary beside the data."""
    line = explain(FileNotFoundError(2, "No such file", str(class_data / "dict.txt")))
    assert line and line.startswith(f"{class_data}/dict.txt: no such file; is the checkpoint an encoder")


def test_a_warm_up_that_never_ends_is_said(class_data: Path) -> None:
    for updates, said in ((2, True), (3, False)):
        with capture_log() as log:
            train(command(class_data, "--lr-scheduler", "polynomial_decay", "--total-num-update", "9",
                          "--warmup-updates", "2", max_update=updates))  # fmt: skip
        assert ("--warmup-updates 2 is not below --max-update 2: the learning" in str(log["text"])) is said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--reset-optimizer"], "is set with a --reset flag; leave these out, as it resets all that they do"),
        (["--restore-file", "other.pt"], "is set with --restore-file; leave one of them out"),
    ],
)
def test_finetune_from_a_model_goes_without_other_starts(flags: list[str], line: str, class_data: Path) -> None:
    found = library_refusal(command(class_data, "--finetune-from-model", "gone.pt", *flags))
    assert found == f"--finetune-from-model {line}"


def test_the_best_checkpoint_is_not_sought_at_the_wrong_end(class_data: Path) -> None:
    metric, maximize = "--best-checkpoint-metric", "--maximize-best-checkpoint-metric"
    line = library_refusal(command(class_data, metric, "accuracy", validate=True))
    assert line.startswith(f"{metric} accuracy is set alone, so the worst ") and line.endswith(f"; add {maximize}")
    line = library_refusal(command(class_data, maximize, validate=True))
    assert line.startswith(f"{metric} loss is set with {maximize}, so the worst ")
    for flags in ([metric, "accuracy", maximize], [metric, "nll_loss"]):
        assert train(command(class_data, *flags, max_update=1, validate=True))["valid"]
    assert train(command(class_data, metric, "accuracy", max_update=1))["train_inner"]  # nothing is validated


def test_a_split_without_labels(class_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(class_data, data)
    for path in (data / "input0").glob("valid.*"):
        shutil.copy(path, path.with_stem("test"))
    line = library_refusal(command(data, "--valid-subset", "test", validate=True))
    assert line.startswith(f"{data}/label: no labels of the split test, which --train-subset or --valid-subset names;")


@pytest.mark.parametrize("where", ["train", "valid"])
def test_labels_outside_the_classes(where: str, class_data: Path, tmp_path: Path) -> None:
    """Three labels for two classes: fairseq would fail in the middle of an epoch, on a GPU without a message."""
    data = tmp_path / "data"
    shutil.copytree(class_data, data)
    write_labels(data, where, ["1", "0"] * (12 if where == "train" else 5), last="2", words=("1", "0", "2"))
    arguments = command(data, validate=True)
    line = library_refusal(arguments)
    count = 24 if where == "train" else 10
    assert line.startswith(f"{data}/label/{where}: example {count} has a label '2' (number 2), outside the 2 classes")


def test_starting_anew_over_a_finished_run_is_said(checkpoint: Path, class_data: Path, tmp_path: Path) -> None:
    """fairseq loads a named --restore-file at every start: the same command does not resume."""
    arguments = start_from(checkpoint, class_data, "--max-update", "1")
    arguments.remove("--no-save")
    arguments += ["--save-dir", str(tmp_path)]
    assert "begins anew" not in "\n".join(train(arguments)["text"])
    text = "\n".join(train(arguments)["text"])
    assert "this run begins anew and will overwrite" in text and "give --finetune-from-model" in text


def test_a_label_that_the_dictionary_does_not_hold(class_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(class_data, data)
    write_labels(data, "train", ["1", "0"] * 12, last="maybe", words=("1", "0"))
    assert "has a label that label/dict.txt does not hold (number -1)" in library_refusal(command(data))


def test_a_target_that_is_no_number(regression_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(regression_data, data)
    labels = (data / "label" / "train.label").read_text().splitlines()
    (data / "label" / "train.label").write_text("\n".join([*labels[:-1], "nan"]) + "\n")
    line = library_refusal(command(data, "--regression-target", num_classes=1))
    assert line.startswith(f"{data}/label/train: example 24 has the target nan")


# --- checkpoints ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(class_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    train(command(class_data, save_dir=folder, max_update=1))
    return folder / "checkpoint_last.pt"


def start_from(checkpoint: Path, data: Path, *flags: str) -> list[str]:
    reset = ["--reset-optimizer", "--reset-dataloader", "--reset-meters"]
    return command(data, "--restore-file", str(checkpoint), *reset, *flags)


def test_a_missing_checkpoint_never_trains_from_scratch(class_data: Path) -> None:
    assert "--restore-file gone.pt: no such file" in library_refusal(start_from(Path("gone.pt"), class_data))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_files_that_are_no_checkpoint(
    kind: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fairseq's programs read them; each in our own words: torch's advise to load the file unsafely."""
    monkeypatch.chdir(tmp_path)
    make, message = CHECKPOINTS[kind]
    make(checkpoint, Path("bad.pt"))
    with pytest.raises(UsageError) as caught:
        checkpoint_utils.load_checkpoint_to_cpu("bad.pt")
    line = explain(caught.value) or ""
    assert re.match(r"bad\.pt: .*" + message, line) and line.isprintable()
    assert not re.search("weights_only|add_safe_globals|http|--restore-file", line)
    assert not Path("hostile").exists()


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model"])
def test_a_foreign_object_when_training_starts(flag: str, checkpoint: Path, class_data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    CHECKPOINTS["a foreign object"][0](checkpoint, bad)
    assert library_refusal(command(class_data, flag, str(bad))).startswith(f"{bad}: it holds hostile_samples.Foreign,")


@pytest.mark.slow  # the message: test_files_that_are_no_checkpoint
def test_a_truncated_checkpoint_in_the_program(checkpoint: Path, class_data: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.pt"
    short.write_bytes(checkpoint.read_bytes()[:1000])
    assert f"error: {short}: not a readable checkpoint" in refusal(start_from(short, class_data))


EMBEDDINGS = "encoder.sentence_encoder.embed_tokens.weight"
UNFIT = {
    "--encoder-embed-dim 32": rf"{EMBEDDINGS} is \[17, 16\] in it and \[17, 32\] in the model, and \d+ more",
    "--encoder-layers 3": r"it has no encoder\.sentence_encoder\.layers\.2\.\S+",
    "--encoder-layers 1": r"the model has no encoder\.sentence_encoder\.layers\.1\.\S+",
}


@pytest.mark.parametrize("flags", UNFIT)
def test_a_checkpoint_of_another_shape(flags: str, checkpoint: Path, class_data: Path) -> None:
    line = library_refusal(start_from(checkpoint, class_data, *flags.split()))
    expected = rf"{checkpoint}: its weights do not fit the model \({UNFIT[flags]}\); choose the --arch, sizes and data"
    assert re.match(expected, line), line


def test_resuming_with_another_criterion_optimizer_or_head(checkpoint: Path, class_data: Path, tmp_path: Path) -> None:
    """fairseq asserts the first two without a word about --save-dir; torch finds a weight too few or too many."""
    folder = checkpoint.parent
    for other in ({"criterion": "rdrop_sentence_prediction"}, {"optimizer": "adam"}):
        line = library_refusal(command(class_data, save_dir=folder, **other))
        assert line.startswith(f"--{next(iter(other))}: the checkpoint to go on from is of a run with "), line
        assert line.endswith("; give another --save-dir, and to start from its weights --finetune-from-model")
    train(command(class_data, save_dir=tmp_path, optimizer="adam", max_update=1))
    last = tmp_path / "checkpoint_last.pt"
    state = torch.load(last)
    state["last_optimizer_state"]["param_groups"][0]["params"].pop()
    torch.save(state, last)
    line = library_refusal(command(class_data, save_dir=tmp_path, optimizer="adam"))
    assert line.startswith("the checkpoint's optimizer has another number of weights than this run"), line


def test_resuming_with_another_precision(checkpoint: Path, class_data: Path) -> None:
    """The teacher is one tensor per parameter here, and there one per parameter of another model."""
    optimizer = optim.build_optimizer(parse(command(class_data)).optimizer, [torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UsageError, match="do not fit the 1 of this run"):
        optimizer.load_state_dict(torch.load(checkpoint)["last_optimizer_state"])
    state = {"mbpp": {"teacher": [torch.zeros(2)], "updates": 1}}
    with pytest.raises(UsageError, match=r"teacher has other shapes .*\(\[2\], here \[3\]\), .* another --save-dir"):
        optimizer.load_state_dict(state)
    with pytest.raises(UsageError, match="holds no teacher; start anew with --reset-optimizer"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_other_errors_keep_their_traceback() -> None:
    assert explain(RuntimeError("something else")) is None
    assert explain(AttributeError("no such thing")) is None


def test_an_error_from_a_worker_process_is_one_line_too() -> None:
    error = RuntimeError("\n\n-- Process 0 terminated:\nTraceback ...\nsmart_fairseq.errors.UsageError: --flag is 1\n")
    assert explain(error) == "--flag is 1"


def test_the_same_command_without_a_mistake_trains(class_data: Path) -> None:
    assert train(command(class_data, max_update=1))["train_inner"][0]["loss"] > 0


def test_steps_do_not_matter_where_the_term_is_off(class_data: Path) -> None:
    """--smart-steps 0 is refused with the term on, and was never with it off."""
    build(command(class_data, "--smart-weight", "0", "--smart-steps", "0"))
    with pytest.raises(UsageError, match="--smart-steps is 0; it must be 1 or more"):
        build(command(class_data, "--smart-steps", "0"))


@pytest.mark.parametrize("flag", ["--report-mcc", "--report-acc-and-f1"])
def test_a_report_that_makes_numbers_of_words_is_refused(flag: str, tmp_path: Path) -> None:
    """After a whole epoch fairseq would find that a label is none."""
    data = write_data(tmp_path / "data")
    labels = data / "label" / "dict.txt"
    labels.write_text(labels.read_text().replace("0 ", "not_entailment ", 1))
    line = library_refusal(command(data, flag, max_update=1))
    assert f"{flag} is set, and {labels} has the label 'not_entailment'" in line


def test_a_worker_that_did_not_read_the_checkpoint_itself_warns_of_nothing(class_data: Path, tmp_path: Path) -> None:
    """fairseq reads it on the first worker, and hands its state to the others."""
    for there in (False, True):
        if there:
            (tmp_path / "checkpoint_last.pt").touch()
        with capture_log() as log:
            task, _, criterion = set_up(class_data, save_dir=tmp_path)
            check_start(criterion.cfg, task.cfg, criterion.objectives)
        assert ("training starts from random weights" in str(log["text"])) is not there


NORMALIZE = ["--smart-projection", "normalize"]


@pytest.mark.parametrize(
    ("criterion", "flags", "acting", "words"),
    [
        ("freelb", ["--freelb-steps", "1"], ["--freelb-steps", "2"], "--freelb-steps 1 leaves no step of ascent"),
        ("freeat", ["--freeat-steps", "1"], ["--freeat-steps", "2"], "--freeat-steps 1 leaves no step of ascent"),
        ("smart", [*NORMALIZE, "--smart-epsilon", "0.5"], NORMALIZE, "--smart-epsilon 0.5 changes nothing"),
        ("smart", ["--smart-every", "2"], ["--smart-every", "1"], "--smart-every 2 is no shorter than the run, 2 upd"),
    ],
)
def test_what_does_nothing_is_said_before_training(
    criterion: str, flags: list[str], acting: list[str], words: str, class_data: Path
) -> None:
    for given in (flags, acting):
        log = train(command(class_data, *given, criterion=f"{criterion}_sentence_prediction", max_update=2))
        assert sum(words in str(line) for line in log["text"]) == (given is flags)


@pytest.mark.parametrize("criterion", ["sentence_prediction", "smart_sentence_prediction"])
def test_a_run_that_diverges_ends_in_a_line(criterion: str, class_data: Path, tmp_path: Path) -> None:
    """fairseq's search for the place ends in a StopIteration for every RoBERTa."""
    far = command(class_data, "--lr", "1e30", criterion=criterion, optimizer="adam", save_dir=tmp_path, max_update=9)
    with pytest.raises(StopIteration) as caught:
        train(far)
    assert explain(caught.value).startswith("the gradients are not finite; lower --lr, ")
    assert (tmp_path / "crash.pt").is_file()
