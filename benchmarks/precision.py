"""How exact is the smoothness term? The criterion in each precision against Algorithm 1 in float64, on a tuned encoder.

    make demo                                                # once, for the encoder
    python benchmarks/precision.py --glue glue_data .        # folders that hold CoLA, STS-B and snli_1.0
    python benchmarks/precision.py --glue glue_data . --modes tangent finite --multiples 1 2 4 8

The encoder is tuned once for each kind of output, by plain fairseq, on a few hundred rows that it ends by knowing by
heart, so that confident examples are among those measured; it is kept in --demo. The reference is written here from
the paper's definitions, on the weights as the precision rounds them, and takes from the package the starting noise
alone. Steps are 100 times as long as the radius. Radii are absolute, or multiples of one rounding: the precision's
epsilon times the median size of the entries that are perturbed.
"""

import argparse
import copy
import dataclasses
import functools
import json
import logging
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from facts import ROOT, facts
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor, nn

import smart_fairseq
from smart_fairseq.commands import preprocess
from smart_fairseq.commands.options import import_report
from smart_fairseq.data.readers import find_sources, read_task
from smart_fairseq.data.tasks import TASKS, Task
from smart_fairseq.encoder import Forward
from smart_fairseq.method.noise import example_noise
from smart_fairseq.study.recipe import prepare

NOISE_STD = 1e-5
ROWS, UPDATES, BATCH = 640, 240, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLACES = {"token": "embed_tokens", "input": "dropout_module"}
MODES = ("auto", "tangent", "finite")  # what the rule chooses, the first order, two forwards

_FIFTHS = dataclasses.replace(TASKS["STS-B"], labels=("0", "1", "2", "3", "4"), metrics=("accuracy",))
KINDS: dict[str, Task] = {"2": TASKS["CoLA"], "3": TASKS["SNLI"], "5": _FIFTHS, "regression": TASKS["STS-B"]}


# The tuned encoder


def write_data(kind: str, sources: list[Path], imported: Path, target: Path) -> None:
    """A data folder with the first rows of the kind's training part, or of what there is."""
    task = KINDS[kind]
    read = dataclasses.replace(task, labels=TASKS[task.name].labels)
    source = next((folder for folder in sources if find_sources(read, folder)), None)
    if source is None:
        sys.exit(
            f"precision: error: --glue is {' '.join(map(str, sources))}; one must hold {' or '.join(read.folders)}"
        )
    parts, _ = read_task(read, source, skip_bad_rows=True)
    rows = (parts.get("train") or parts["valid"])[:ROWS]
    if task.labels and not read.labels:  # a score from 0 to 5, cut into as many classes
        rows = [row._replace(label=str(min(int(float(row.label or 0)), 4))) for row in rows]
    prepare(preprocess.Data(task, {"train": rows}), target, imported, max_tokens=64)


def arguments(kind: str, data: Path, imported: Path, *flags: str) -> list[str]:
    """Of fairseq-train."""
    task = KINDS[kind]
    return [
        *(str(data), "--user-dir", str(Path(smart_fairseq.__file__).parent), "--task", "sentence_prediction"),
        *("--num-classes", str(task.num_classes), "--init-token", "0", "--required-batch-size-multiple", "1"),
        *(("--regression-target",) if task.regression else ()),
        *import_report(imported)["flags"],
        *("--optimizer", "adam", "--lr", "1e-4", "--lr-scheduler", "polynomial_decay", "--cpu", "--seed", "1"),
        *("--warmup-updates", str(UPDATES // 10), "--total-num-update", str(UPDATES), "--max-update", str(UPDATES)),
        *("--batch-size", str(BATCH), "--num-workers", "0", "--clip-norm", "1", *flags),
    ]


def tuned(kind: str, sources: list[Path], demo: Path) -> tuple[Path, Path]:
    """The kind's data folder and its checkpoint, made by the first call alone."""
    imported, folder = demo / "encoder" / "fairseq", demo / "precision" / kind
    data, checkpoint = folder / "data-bin", folder / "tuned.pt"
    if not (imported / "model.pt").is_file():
        sys.exit(f"precision: error: --demo is {demo}, which holds no encoder; run `make demo` first")
    if not checkpoint.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_data(kind, sources, imported, data)
        training = arguments(
            *(kind, data, imported, "--criterion", "sentence_prediction", "--restore-file", str(imported / "model.pt")),
            *("--reset-optimizer", "--reset-dataloader", "--reset-meters", "--disable-validation"),
            *(
                "--no-epoch-checkpoints",
                "--no-save-optimizer-state",
                "--save-interval",
                "99",
                "--save-dir",
                str(folder / "training"),
            ),
        )
        print(f"tuning the encoder on {KINDS[kind].name}, {UPDATES} updates ...", flush=True)
        with (folder / "log").open("w") as log:
            command = [str(Path(sys.executable).parent / "fairseq-train"), *training]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        (folder / "training" / "checkpoint_last.pt").rename(checkpoint)
    return data, checkpoint


# Algorithm 1, from the paper's definitions


class Reference:
    """R_s and the perturbation of one batch, in float64; a model without dropout."""

    def __init__(self, model: nn.Module, sample: dict[str, Any], place: str, regression: bool) -> None:
        self.model = copy.deepcopy(model).double()
        for module in self.model.modules():  # fairseq's own works in float32
            if hasattr(module, "activation_fn") and "gelu" in module.activation_fn.__name__:
                module.activation_fn = nn.functional.gelu
        self.regression, self.inputs, tokens = regression, sample["net_input"], sample["net_input"]["src_tokens"]
        self.encoder = self.model.encoder.sentence_encoder
        self.module = getattr(self.encoder, PLACES[place])
        self.mask = tokens.ne(self.encoder.padding_idx)[:, :, None].double()
        with torch.no_grad():
            self.clean, self.perturbed = self.outputs(None)
        noise = example_noise(sample["id"], tokens.shape[1], self.perturbed.shape[2], seed=torch.initial_seed())
        self.start = NOISE_STD * noise.double() * self.mask
        self.first_gradient = self.gradient(self.start)

    def outputs(self, perturbation: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs [B, K], and what was perturbed [B, T, C]."""
        seen: list[Tensor] = []

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen.append(output)
            return output if perturbation is None else output + perturbation

        handle = self.module.register_forward_hook(add)
        try:
            logits, _ = self.model(
                **self.inputs, features_only=True, classification_head_name="sentence_classification_head"
            )
        finally:
            handle.remove()
        assert len(seen) == 1 and logits.dtype == seen[0].dtype == torch.float64
        return logits, seen[0]

    def divergence(self, perturbation: Tensor) -> Tensor:
        """l_s of each example: KL(P, Q) + KL(Q, P), or (p - q)^2."""
        logits, _ = self.outputs(perturbation)
        if self.regression:
            return (logits - self.clean).square().sum(dim=1)
        logs, clean = logits.log_softmax(dim=1), self.clean.log_softmax(dim=1)
        return ((logs.exp() - clean.exp()) * (logs - clean)).sum(dim=1)

    def gradient(self, perturbation: Tensor) -> Tensor:
        perturbation = perturbation.detach().requires_grad_()
        return torch.autograd.grad(self.divergence(perturbation).sum(), perturbation)[0] * self.mask

    def __call__(self, radius: float, steps: int) -> tuple[float, Tensor]:
        """R_s as a mean over the batch, and the perturbation [B, T, C]."""
        perturbation = self.start
        for step in range(steps):
            gradient = self.first_gradient if step == 0 else self.gradient(perturbation)
            gradient = gradient / gradient.abs().amax(dim=(1, 2), keepdim=True)
            perturbation = (perturbation + 100 * radius * gradient).clamp(-radius, radius)
        with torch.no_grad():
            return float(self.divergence(perturbation).mean()), perturbation

    def entry(self) -> float:
        """The median size of what is perturbed, at real tokens."""
        return float(self.perturbed[self.mask.bool()[:, :, 0]].abs().median())

    def confident(self) -> float:
        """The share of examples that have a class with p > 0.98."""
        return math.nan if self.regression else float((self.clean.softmax(1).amax(1) > 0.98).double().mean())


# The criterion


class Measured(NamedTuple):
    term: float  # R_s as a mean over the batch
    perturbation: Tensor
    form: str


class Setting:
    """One kind of output: the tuned model, batches of its data, the criterion under any flags."""

    def __init__(self, kind: str, sources: list[Path], demo: Path) -> None:
        self.kind, self.imported = kind, demo / "encoder" / "fairseq"
        self.data, checkpoint = tuned(kind, sources, demo)
        self.cfg = self.configuration()
        self.task = tasks.setup_task(self.cfg.task)
        self.model = self.task.build_model(self.cfg.model)
        self.model.load_state_dict(checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))["model"])
        self.task.load_dataset("train")

    def configuration(self, *flags: str) -> Any:
        none = ("--dropout", "0", "--attention-dropout", "0", "--pooler-dropout", "0", "--activation-dropout", "0")
        line = arguments(self.kind, self.data, self.imported, "--criterion", "smart_sentence_prediction", *none, *flags)
        parser = options.get_training_parser()
        return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=line))

    def batches(self, count: int, size: int) -> list[dict[str, Any]]:
        data = self.task.dataset("train")
        return [data.collater([data[i] for i in range(k * size, (k + 1) * size)]) for k in range(count)]

    def criterion(self, place: str, steps: int, radius: float, mode: str) -> Any:
        flags = {
            "smart-recipe": "paper",
            "smart-embedding": place,
            "smart-steps": steps,
            "smart-mode": mode,
            "smart-epsilon": radius,
            "smart-step-size": 100 * radius,
            "smart-noise-std": NOISE_STD,
        }
        cfg = self.configuration(*(part for name, value in flags.items() for part in (f"--{name}", str(value))))
        criterion = tasks.setup_task(cfg.task).build_criterion(cfg.criterion).train()
        criterion.task.datasets = self.task.datasets
        return criterion

    def measure(self, criterion: Any, model: nn.Module, sample: dict[str, Any]) -> Measured:
        torch.manual_seed(1)
        encoder = criterion.encoder_for(model)
        forward = Forward(encoder, model, sample["net_input"], criterion.classification_head_name, criterion.place)
        with criterion.term("smart", forward, sample) as value:
            clean = forward()
        found = value(clean)
        assert found.perturbation is not None
        return Measured(float(found.value.detach()) / len(clean), found.perturbation, criterion.forms[""].term.value)


def cosines(ours: Tensor, reference: Tensor) -> list[float]:
    return nn.functional.cosine_similarity(ours.double().flatten(1), reference.flatten(1)).tolist()


def compare(
    setting: Setting, references: list[Reference], samples: list[Any], model: nn.Module, place: str, steps: int,
    mode: str, dtype: str, radius: float, multiple: float,
) -> dict[str, Any]:  # fmt: skip
    """One cell: the error of R_s over all batches in %, and the cosines of the perturbations, example by example."""
    criterion = setting.criterion(place, steps, radius, mode)
    ours, true, found, words = [], [], [], ""
    for reference, sample in zip(references, samples):
        value, perturbation = reference(radius, steps)
        term, measured, words = setting.measure(criterion, model, sample)
        ours.append(term)
        true.append(value)
        found += cosines(measured, perturbation)
    return {
        **{"kind": setting.kind, "place": place, "steps": steps, "dtype": dtype, "mode": mode, "radius": radius},
        **{"multiple": multiple, "R_s": sum(true) / len(true), "error": 100 * (sum(ours) / sum(true) - 1)},
        "batch_errors": [100 * (a / b - 1) for a, b in zip(ours, true)],
        "cosine": statistics.median(found),
        "least_cosine": min(found),
        "took": words,
    }


def printed(rows: list[dict[str, Any]], by: str) -> str:
    """A line of the table: the error of R_s and the median cosine at each radius."""
    first = rows[0]
    cells = [f"{r[by]:.3g}: {r['error']:+.1f} % {r['cosine']:.3f}{_short(r)}" for r in rows]
    return f"{first['kind']:>10} {first['place']} K={first['steps']} {first['dtype']} {first['mode']} | " + " | ".join(
        cells
    )


def _short(row: dict[str, Any]) -> str:
    return "" if row["mode"] != "auto" else " (first order)" if row["took"] == "first_order" else " (two)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", nargs="+", type=Path, default=[], help="folders that hold the tasks' official files")
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="where `make demo` put the encoder")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--places", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["auto"])
    parser.add_argument("--radii", nargs="+", type=float, default=[1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--multiples", nargs="+", type=float, help="of one rounding, instead of radii")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="examples in each")
    parser.add_argument("--out", type=Path, help="also write all figures as JSON, line by line as they are there")
    args = parser.parse_args()
    logging.getLogger("smart_fairseq").setLevel(logging.ERROR)
    logging.getLogger("fairseq").setLevel(logging.ERROR)
    about, rows, settings = facts(__file__), [], functools.cache(lambda k: Setting(k, args.glue, args.demo.resolve()))
    print(", ".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    by = "multiple" if args.multiples else "radius"
    print(f"by {by}: error of R_s, median cosine", flush=True)
    for kind in args.kinds:
        samples = settings(kind).batches(args.batches, args.batch)
        for dtype in args.dtypes:
            model = copy.deepcopy(settings(kind).model).to(DTYPES[dtype]).train()
            for place in args.places:
                torch.manual_seed(1)  # of the noise
                references = [Reference(model, sample, place, KINDS[kind].regression) for sample in samples]
                entry = statistics.mean(reference.entry() for reference in references)
                rounding = torch.finfo(DTYPES[dtype]).eps * entry
                confident = statistics.mean(reference.confident() for reference in references)
                about[f"{kind} {place} {dtype}"] = {"rounding": rounding, "entry": entry, "confident": confident}
                radii = [m * rounding for m in args.multiples] if args.multiples else args.radii
                for steps in args.steps:
                    for mode in args.modes:
                        line = []
                        for radius in radii:
                            line.append(
                                compare(settings(kind), references, samples, model, place, steps, mode, dtype, radius,
                                        radius / rounding)
                            )  # fmt: skip
                            if args.out:
                                args.out.write_text(json.dumps({**about, "rows": rows + line}, indent=1) + "\n")
                        rows += line
                        print(printed(line, by), flush=True)


if __name__ == "__main__":
    main()
