"""Updates on a CUDA device that is not there: their launches, their waits, their memory, and mixed devices.

Tensors are torch's fake ones, which have a device, a shape and a dtype but no numbers: an operation on mixed devices
raises as on a GPU, and every operation that would reach the device is seen. Nothing here says that a result is right.

A torch built for the CPU takes no gradients on "cuda" without a device guard: pretended_cuda.cpp, compiled by g++ when
this module is imported; kept for the next program where PRETENDED_CUDA_FOLDER names a folder. It must be in the process
before torch is, so a program imports this module first.
"""

# ruff: noqa: E402  the guard comes before torch

import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _load_guard(folder: Path) -> None:
    """Compile the guard into ``folder``, if it is not there, and load it; its symbols come before torch's."""
    if "torch" in sys.modules:
        raise ImportError("pretended_cuda must be imported before torch")
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    if shutil.which("g++") is None:
        raise SystemExit("a pretended device needs g++, which is not there")
    if re.search(r"^cuda\b.*= None$", (Path(found.origin).parent / "version.py").read_text(), re.MULTILINE) is None:
        raise SystemExit(
            "a pretended device needs a torch that was built for the CPU, and this one was built for CUDA; install "
            "torch's build for the CPU in an environment of its own"
        )
    torch_folder, library = Path(found.origin).parent, folder / "pretended_cuda.so"
    source = Path(__file__).resolve().with_suffix(".cpp")
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{torch_folder}/include", "-o", str(library)]
    command += [str(source), f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib"]
    if not library.exists():
        subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


with tempfile.TemporaryDirectory() as name:
    _load_guard(Path(os.environ.get("PRETENDED_CUDA_FOLDER", name)))

import fairseq
import torch
from fairseq import optim, tasks
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.utils import apply_to_sample
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

import smart_fairseq
from smart_fairseq.criterions import smart_sentence_prediction
from smart_fairseq.terms.precision import PlaceSizes

aten = torch.ops.aten
# in whose functions a wait may be, by the name that it is given there
FOLDERS = {"smart_fairseq": Path(smart_fairseq.__file__).parent, "fairseq": Path(fairseq.__file__).parent}
# kernels that one operation launches, where they are several
KERNELS = {
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "embedding_dense_backward": 4,
    "median": 4,
    "native_layer_norm_backward": 2,
}
# that launch nothing and say so neither by their schema nor by sharing memory
WITHOUT_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
# per launch of a foreach operation, by the number of lists (ATen/native/cuda/MultiTensorApply.cuh)
TENSORS_A_LAUNCH, BLOCKS_A_LAUNCH, BLOCK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536
# of a mask's rows, for the memory-efficient attention (ATen/native/transformers/attention.cpp)
MASK_ALIGNMENT = 8


class Device(TorchDispatchMode):
    """What the operations within the block would ask of a GPU.

    launches: kernels, by the phase of the update: forward, backward, step.
    waits: reads and copies for which the host waits, by phase and place.
    draws: the random operations of the forward phase, in stretches from one use of the generator's state to the next.
    operations: what was launched, by phase and name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.draws: list[list[str]] = [[]]

    def wait(self, what: str) -> None:
        self.waits[f"{self.phase}, {what}: {place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" and getattr(args[0], "constant", None) is None:
            if args[0].is_cuda:
                self.wait("read")
            return answer(args[0])
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            tensor.made_by = name  # type: ignore[attr-defined]
        if name in ("_to_copy", "copy_") and len({tensor.is_cuda for tensor in (*given, *made)}) > 1:
            self.wait("copy")
        works = (made or func._schema.is_mutable) and not is_view(func, name)
        if works and any(tensor.is_cuda for tensor in (*given, *made)):
            count = launches_of(name, args)
            self.launches[self.phase] += count
            self.operations[f"{self.phase} {name}"] += count
        if self.phase == "forward" and is_random(func, name, args):
            # on all of which the numbers may depend that a kernel draws
            self.draws[-1].append(f"{name} {list(given[0].shape)} {given[0].stride()} {given[0].dtype}")
        return result


def is_view(func: Any, name: str) -> bool:
    if name in WITHOUT_KERNEL:
        return True
    aliases = [returned.alias_info for returned in func._schema.returns]
    return all(alias is not None and not alias.is_write for alias in aliases) and not func._schema.is_mutable


def is_random(func: Any, name: str, args: Any) -> bool:
    if "scaled_dot_product" in name:
        return "backward" not in name and any(isinstance(value, float) and 0 < value < 1 for value in args)
    return torch.Tag.nondeterministic_seeded in func.tags


def launches_of(name: str, args: Any) -> int:
    if not name.startswith(("_foreach", "_fused")):
        return KERNELS.get(name, 1)
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and hasattr(value[0], "numel")]
    tensors = len(lists[0])
    blocks = sum(math.ceil(tensor.numel() / BLOCK) for tensor in lists[0])
    return max(math.ceil(tensors / TENSORS_A_LAUNCH[min(len(lists), 5)]), math.ceil(blocks / BLOCKS_A_LAUNCH))


def answer(tensor: Any) -> Any:
    """What the host reads: there is padding, everything is finite and equals nothing, numbers are 0."""
    if tensor.dtype == torch.bool:
        return getattr(tensor, "made_by", "") not in ("eq", "ne", "gt")
    return 0.0 if tensor.is_floating_point() else 0


def place() -> str:
    """The innermost function of `FOLDERS` on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for name, folder in FOLDERS.items():
            if path.startswith(f"{folder}/"):
                return f"{name}{path.removeprefix(str(folder))} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


def current_device() -> Device | None:
    return next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Device)), None)


@contextmanager
def pretended() -> Iterator[Callable[[Any], Any]]:
    """A block in which models are built on the device; what it yields moves a batch there.

    One block for all updates of a program: it remembers what an operation gives, and torch stays altered.
    """
    _pretend()
    with FakeTensorMode() as mode:
        yield lambda sample: apply_to_sample(lambda tensor: mode.from_tensor(tensor).to("cuda"), sample)


def _pretend() -> None:
    """What a build without CUDA has not in Python."""
    on_cpu, from_list = functional.scaled_dot_product_attention, FakeTensor.tolist
    state = torch.zeros(16, dtype=torch.uint8)

    def stretch(*_: Any) -> Any:
        device = current_device()
        if device is not None:
            device.draws.append([])
        return state

    def attention(
        q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
    ) -> Any:
        """CUDA's choice: flash attention in half precision without a mask, otherwise the memory-efficient one."""
        if not q.is_cuda:
            return on_cpu(q, k, v, attn_mask, dropout_p, is_causal)
        half, aligned = q.dtype in (torch.float16, torch.bfloat16), q.shape[-1] % 8 == 0
        if attn_mask is None and half and aligned:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False)[0]
        if attn_mask is not None:
            if any(stride % MASK_ALIGNMENT for stride in attn_mask.stride()[:-1]):
                attn_mask = functional.pad(attn_mask, (0, MASK_ALIGNMENT - k.shape[2] % MASK_ALIGNMENT))
            attn_mask = attn_mask[..., : k.shape[2]].expand(*q.shape[:3], k.shape[2])
        keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, keeps, dropout_p, is_causal)[0]

    def tolist(tensor: Any) -> Any:
        """One read, however long."""
        device = current_device()
        if not tensor.is_cuda or device is None:
            return from_list(tensor)
        device.wait("read")
        values: Any = answer(tensor)
        for size in reversed(tensor.shape):
            values = [values] * size
        return values

    # entries of size 1 are perturbed
    smart_sentence_prediction.measure_place = lambda *_: PlaceSizes(1.0, 1.0, 100.0)
    torch.cuda.get_rng_state = torch.cuda.set_rng_state = stretch  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    FakeTensor.tolist = tolist  # type: ignore[assignment]


def move(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """To the device, in place: fake parameters cannot be swapped, as `nn.Module.to` does."""
    moved: dict[Any, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in moved:
                moved[parameter] = torch.nn.Parameter(parameter.detach().to("cuda", dtype))
            module._parameters[name] = moved.get(parameter)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to("cuda")


class Update:
    """A model on the device with what trains it.

    Args:
        cfg: fairseq's.
        precision: "fp32", "bf16", "fp16", "fp16 flat" or "amp", as fairseq's flags of these names set them up.
    """

    def __init__(self, cfg: Any, precision: str) -> None:
        cfg.common.bf16 = precision == "bf16"
        cfg.common.fp16 = precision.startswith("fp16")
        cfg.common.fp16_no_flatten_grads = precision == "fp16"
        cfg.common.amp = precision == "amp"
        if "smart_amp" in cfg.criterion:
            cfg.criterion.smart_amp = cfg.common.amp
        self.clip_norm = cfg.optimization.clip_norm
        self.task = tasks.setup_task(cfg.task)
        self.model = self.task.build_model(cfg.model)
        move(self.model, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.split()[0], torch.float32))
        self.criterion = self.task.build_criterion(cfg.criterion)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if cfg.common.bf16 or cfg.common.fp16:
            self.optimizer = optim.FP16Optimizer.build_optimizer(cfg, trained)
        elif cfg.common.amp:
            self.optimizer = AMPOptimizer.build_optimizer(cfg, trained)
        else:
            self.optimizer = optim.build_optimizer(cfg.optimizer, trained)

    @property
    def form(self) -> str:
        """Of the smoothness term, in words, after the first update; "" where there is none."""
        return next((form.in_words() for form in getattr(self.criterion, "forms", {}).values()), "")

    def take(self, sample: Any, number: int) -> Device:
        """One update, as fairseq's trainer takes it; what it asked of the device."""
        self.optimizer.zero_grad()
        with Device() as device:
            backward = self.optimizer.backward

            def next_phase(loss: torch.Tensor) -> None:
                device.phase = "backward"
                backward(loss)
                device.phase = "forward"  # of the next pass, where there are several

            self.optimizer.backward = next_phase
            _, size, _ = self.task.train_step(sample, self.model, self.criterion, self.optimizer, number)
            del self.optimizer.backward
            device.phase = "step"
            self.optimizer.multiply_grads(1 / size)
            self.optimizer.clip_grad_norm(self.clip_norm)
            self.optimizer.step()
        return device
