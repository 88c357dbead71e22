"""The cost of an update: SMART and MBPP beside plain fine-tuning, interleaved in one process over the same batches.

    python benchmarks/update_cost.py --model minilm --batch 16 --length 64 --dtype fp32 --out cost.json

Per variant: arithmetic in forward-equivalents (torch's FlopCounterMode; a third of plain fine-tuning's is one), time
per update with the optimizer's step as the median over rounds of the ratio to plain in the same round, the peak of
memory beyond weights, gradients, optimizer state and teacher, and on CUDA how often an update waits for the device and
how many kernels it launches. Weights are random: the cost does not depend on them. "literal" is how public code does
it: weight gradients in the inner step, a second clean forward, a cloned and swapped teacher, a check on the host.
"""

import argparse
import copy
import json
import logging
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from facts import facts
from fairseq import optim, options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from peak_memory import PeakMemory
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from smart_fairseq.encoder import encoder_of
from smart_fairseq.method.divergence import symmetric_kl

ROOT = Path(__file__).resolve().parents[1]
HEAD = "sentence_classification_head"
# to try a benchmark with
TINY = ["--arch", "roberta", "--encoder-layers", "2", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"]
MODELS = {
    "tiny": ([*TINY, "--encoder-attention-heads", "2"], 64),
    "minilm": (["--arch", "smart_bert_minilm_l6"], 30522),
    "roberta_base": (["--arch", "roberta_base"], 50265),
    "roberta_large": (["--arch", "roberta_large"], 50265),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAPER = ["--criterion", "smart_sentence_prediction", "--smart-recipe", "paper"]
SMART = [*PAPER, "--smart-epsilon", "1e-2", "--smart-step-size", "1"]
VARIANTS = [
    ("plain", ["--criterion", "sentence_prediction", "--optimizer", "adam"]),
    ("MBPP alone", [*SMART, "--smart-weight", "0", "--optimizer", "mbpp"]),
    ("SMART, 1 step, no teacher", [*SMART, "--optimizer", "adam"]),
    ("SMART, 2 steps, no teacher", [*SMART, "--smart-steps", "2", "--optimizer", "adam"]),
    ("SMART, 3 steps, no teacher", [*SMART, "--smart-steps", "3", "--optimizer", "adam"]),
    ("SMART + MBPP, 1 step", [*SMART, "--optimizer", "mbpp"]),
    ("SMART + MBPP, 2 steps", [*SMART, "--smart-steps", "2", "--optimizer", "mbpp"]),
    ("SMART + MBPP, 3 steps", [*SMART, "--smart-steps", "3", "--optimizer", "mbpp"]),
    (
        "SMART + MBPP, 2 steps, --smart-linear-search",
        [*SMART, "--smart-steps", "2", "--smart-linear-search", "--optimizer", "mbpp"],
    ),
    ("SMART + MBPP, --smart-recompute", [*SMART, "--smart-recompute", "--optimizer", "mbpp"]),
    ("SMART + MBPP, the paper's radius", [*PAPER, "--optimizer", "mbpp"]),
    ("SMART + MBPP, the paper's radius, tangent", [*PAPER, "--smart-mode", "tangent", "--optimizer", "mbpp"]),
    ("R3F", ["--criterion", "r3f_sentence_prediction", "--optimizer", "adam"]),
    ("R-Drop", ["--criterion", "rdrop_sentence_prediction", "--optimizer", "adam"]),
    ("PGD, 2 steps", ["--criterion", "pgd_sentence_prediction", "--optimizer", "adam"]),
    ("FreeLB, 3 passes", ["--criterion", "freelb_sentence_prediction", "--optimizer", "adam"]),
    ("FreeAT, one of its updates", ["--criterion", "freeat_sentence_prediction", "--optimizer", "adam"]),
]
# named with --variants alone
DEFAULT = ["--criterion", "smart_sentence_prediction", "--optimizer", "mbpp"]
ON_DEMAND = [
    ("SMART + MBPP, the default recipe", DEFAULT),
    ("SMART + MBPP, the default recipe, --mbpp-base adamw_fused", [*DEFAULT, "--mbpp-base", "adamw_fused"]),
    ("SMART + MBPP, the release's recipe", [*DEFAULT, "--smart-recipe", "release"]),
]


class Variant:
    """A model with its optimizer and a way to take one update."""

    def __init__(self, flags: list[str], args: argparse.Namespace, folder: Path) -> None:
        model_flags, _ = MODELS[args.model]
        parser = options.get_training_parser()
        arguments = [
            *(
                str(folder),
                "--task",
                "sentence_prediction",
                "--num-classes",
                "2",
                *model_flags,
                "--max-positions",
                "512",
            ),
            *("--user-dir", str(ROOT / "smart_fairseq"), "--lr", "1e-5", "--max-update", "100", *flags),
        ]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=arguments))
        torch.manual_seed(1)
        task = tasks.setup_task(cfg.task)
        self.model = task.build_model(cfg.model).to(args.device, DTYPES[args.dtype]).train()
        self.criterion = task.build_criterion(cfg.criterion)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if args.dtype == "fp32":
            self.optimizer = optim.build_optimizer(cfg.optimizer, parameters)
        elif args.float32_copies:
            cfg.common.bf16, cfg.common.fp16 = args.dtype == "bf16", args.dtype == "fp16"
            cfg.common.fp16_no_flatten_grads = args.device == "cpu"
            self.optimizer = optim.FP16Optimizer.build_optimizer(cfg, parameters)
        else:
            self.optimizer = optim.MemoryEfficientFP16Optimizer.build_optimizer(cfg, parameters)
            self.optimizer.scaler = None
        self.has_teacher = "mbpp" in flags
        if self.has_teacher:
            self.criterion.link.connect(self.optimizer)

    def losses(self, sample: dict[str, Any]) -> Iterable[torch.Tensor]:
        """Of each backward pass; the next one is made when the last one's backward has run."""
        if hasattr(self.criterion, "passes"):
            return (result[0] for result in self.criterion.passes(self.model, sample))
        return [self.loss(sample)]

    def loss(self, sample: dict[str, Any]) -> torch.Tensor:
        return self.criterion(self.model, sample)[0]

    def backward(self, sample: dict[str, Any]) -> None:
        for loss in self.losses(sample):
            self.optimizer.backward(loss / len(sample["id"]))

    def update(self, sample: dict[str, Any]) -> None:
        self.optimizer.zero_grad()
        self.backward(sample)
        self.optimizer.step()


class Literal(Variant):
    """SMART + MBPP with one step, as public code computes it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        super().__init__(["--criterion", "sentence_prediction", "--optimizer", "adam"], args, folder)
        self.teacher = copy.deepcopy(self.model.state_dict())

    def logits(self, sample: dict[str, Any]) -> torch.Tensor:
        return self.model(**sample["net_input"], features_only=True, classification_head_name=HEAD)[0]

    def loss(self, sample: dict[str, Any]) -> torch.Tensor:
        task_loss = self.criterion(self.model, sample)[0]
        clean = self.logits(sample)  # once more: the criterion kept its own
        tokens = sample["net_input"]["src_tokens"]
        encoder = encoder_of(self.model)
        noise = 1e-5 * torch.randn(*tokens.shape, encoder.table.shape[1], device=tokens.device)
        noise.requires_grad_()
        held = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        with encoder.perturbed(noise, "token"):
            symmetric_kl(self.logits(sample), clean.detach()).sum().backward()
        for parameter, gradient in zip(self.model.parameters(), held):
            parameter.grad = gradient
        gradient = noise.grad
        if not bool(torch.isfinite(gradient).all()):
            return task_loss
        step = noise.detach() + 1e-2 * gradient / gradient.abs().amax(dim=(1, 2), keepdim=True)
        with encoder.perturbed(step.clamp(-1e-2, 1e-2), "token"):
            adversarial = self.logits(sample)
        student = copy.deepcopy(self.model.state_dict())
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.data.copy_(self.teacher[name])
            target = self.logits(sample)
            for name, tensor in self.model.state_dict().items():
                tensor.data.copy_(student[name])
        return task_loss + symmetric_kl(adversarial, clean).sum() + symmetric_kl(clean, target).sum()

    def update(self, sample: dict[str, Any]) -> None:
        super().update(sample)
        for name, tensor in self.model.state_dict().items():
            self.teacher[name] = 0.99 * self.teacher[name] + 0.01 * tensor


def write_dictionaries(folder: Path, words: int) -> None:
    """What the task reads at its set-up: a vocabulary of the model's size and two labels."""
    (folder / "input0").mkdir()
    (folder / "label").mkdir()
    vocabulary, labels = Dictionary(), Dictionary()
    for index in range(words - 5):  # the four special symbols and the mask are added by fairseq
        vocabulary.add_symbol(f"w{index}")
    for label in "01":
        labels.add_symbol(label)
    vocabulary.save(str(folder / "input0" / "dict.txt"))
    labels.save(str(folder / "label" / "dict.txt"))


def batches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Random full-length batches, one per round."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for index in range(args.rounds + 1):
        tokens = torch.randint(4, MODELS[args.model][1] - 5, (args.batch, args.length), generator=generator)
        tokens[:, 0] = 0
        net_input = {"src_tokens": tokens.to(args.device)}
        target = torch.randint(0, 2, (args.batch, 1), generator=generator).to(args.device)
        ids = torch.arange(args.batch, device=args.device) + index * args.batch
        found.append({"id": ids, "net_input": net_input, "target": target, "ntokens": tokens.numel()})
    return found


def timed(action: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_activations(variant: Variant, sample: dict[str, Any], device: str) -> float:
    """GiB beyond what is there before the update: weights, gradients, optimizer state and teacher."""
    for parameter in variant.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    if variant.has_teacher:
        variant.criterion.link.weights(variant.model)  # in half precision its copy, made once per update

    if device == "cpu":
        with PeakMemory() as memory:
            variant.backward(sample)
        return memory.peak / 2**30
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant.backward(sample)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def peak_memory(variant: Variant, sample: dict[str, Any]) -> float:
    """GiB of a whole update, of all that is in the process."""
    torch.cuda.reset_peak_memory_stats()
    variant.update(sample)
    return torch.cuda.max_memory_allocated() / 2**30


def cuda_counts(variant: Variant, sample: dict[str, Any]) -> dict[str, int]:
    """How often an update waits for the device, and how many kernels it launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings(record=True) as waits, torch.profiler.profile(activities=activities) as profile:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        variant.update(sample)
        torch.cuda.set_sync_debug_mode("default")
    launches = sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
    return {"synchronisations": sum("synchroniz" in str(w.message) for w in waits), "launches": launches}


class Steps:
    """How far the measurement is: a bar on a terminal, plain lines on standard error otherwise."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, disable=None, leave=False)  # on terminals alone
        self.done = 0

    def begin(self, what: str) -> None:
        self.done += 1
        self.bar.set_description(what)
        self.bar.update(self.done > 1)
        if self.bar.disable:
            print(f"{self.done} of {self.bar.total}: {what}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    chosen = args.variants or [*(label for label, _ in VARIANTS), "literal"]
    steps = Steps(2 * len(chosen) + args.rounds)
    variants: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dictionaries(folder, MODELS[args.model][1])
        for label, flags in [*VARIANTS, *ON_DEMAND, ("literal", [])]:
            if label in chosen:
                steps.begin(f"building {label}")
                variants[label] = Literal(args, folder) if label == "literal" else Variant(flags, args, folder)
    samples = batches(args)
    rows = {label: {"variant": label} for label in variants}
    for label, variant in variants.items():
        steps.begin(f"counting {label}")
        with FlopCounterMode(display=False) as counter:
            variant.update(samples[0])  # also the warm-up
        rows[label]["flops"] = counter.get_total_flops()
        rows[label]["activations_gib"] = peak_activations(variant, samples[0], args.device)
        if args.device == "cuda":
            rows[label]["peak_gib"] = peak_memory(variant, samples[0])
            rows[label].update(cuda_counts(variant, samples[0]))
    times: dict[str, list[float]] = {label: [] for label in variants}
    for number, sample in enumerate(samples[1:], 1):
        steps.begin(f"round {number}")
        for label, variant in variants.items():
            times[label].append(timed(lambda v=variant, s=sample: v.update(s), args.device))
    steps.bar.close()
    for label, row in rows.items():
        row["seconds"] = statistics.median(times[label])
        if "plain" not in rows:
            continue
        row["forward_equivalents"] = row["flops"] / (rows["plain"]["flops"] / 3)
        row["time_over_plain"] = statistics.median(own / plain for own, plain in zip(times[label], times["plain"]))
        row["activations_over_plain"] = row["activations_gib"] / rows["plain"]["activations_gib"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    names = [*(label for label, _ in [*VARIANTS, *ON_DEMAND]), "literal"]
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"rows of the table; default: the first {len(VARIANTS)}",
    )
    parser.add_argument(
        "--float32-copies",
        action="store_true",
        help="half precision as fairseq's --fp16 and --bf16, with weights in float32",
    )
    parser.add_argument("--json", action="store_true", help="print the table as a line of JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of hydra and fairseq about each other
    rows = measure(args)
    chosen = {name: getattr(args, name) for name in ("model", "batch", "length", "dtype", "rounds")}
    about = {**facts(__file__, args.device), **chosen}
    columns = ["variant", "forward_equivalents", "seconds", "time_over_plain"]
    columns += ["activations_gib", "activations_over_plain"]
    columns += ["synchronisations", "launches"] if args.device == "cuda" else []
    columns = [column for column in columns if column in rows[0]]
    about["largest_resident_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if args.out:
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    if args.json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    print("| " + " | ".join(column.replace("_", " ") for column in columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        cells = [f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
