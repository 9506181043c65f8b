"""Choice of float32 or bfloat16: whichever is faster on this device.

`precision = "auto"` means the faster one. On a GPU the hardware decides: native bfloat16 at least doubles the rate of
matrix products. On a CPU, the supported instructions alone do not decide: with AVX512-BF16, bfloat16 was 1.8 times as
fast as float32 on a Zen 4 processor and half as fast on a Xeon without AMX. So a benchmark of a fraction of a second
decides, once per node: the times are cached in a file in the temporary directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import platform
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)

MIN_SPEEDUP = 1.15
"""bfloat16 must be this many times as fast as float32: it costs accuracy, and the optimizer step gains nothing."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ROUNDS, _SECONDS = 5, 0.4  # the benchmark ends after either, but not before two rounds
_OPERATIONS = 5e8  # floating-point operations per thread and pass; rows beyond that are left out
_LOCK_SECONDS = 30.0
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model that determine the speed of each precision.

    Attributes:
        rows: tokens per batch.
        width: features of a token.
        hidden: features inside the feed-forward layer.
        heads: attention heads; 0 for a model without attention.
        head_dim: features of a head.
        length: tokens per sequence, which attend to each other.
        training: forward and backward of float32 weights under autocast; otherwise the forward pass of weights that
            were converted to the precision, as in inference.
    """

    rows: int
    width: int
    hidden: int
    heads: int = 0
    head_dim: int = 0
    length: int = 1
    training: bool = True

    @classmethod
    def of(cls, module: nn.Module, rows: int, *, length: int = 1, head_dim: int = 0, training: bool = True) -> Shapes:
        """Read the sizes from a module's largest linear layer.

        Args:
            module: the model.
            rows: tokens per batch.
            length: tokens per sequence.
            head_dim: features per attention head, 0 without attention; the number of heads is `width // head_dim`.
            training: whether the model is trained; see `Shapes`.
        """
        linears = [layer.weight.shape for layer in module.modules() if isinstance(layer, nn.Linear)]
        hidden, width = max(linears, key=math.prod, default=(1, 1))
        width, hidden = min(width, hidden), max(width, hidden)
        return cls(rows, width, hidden, width // head_dim if head_dim else 0, head_dim, length, training)


@dataclass(frozen=True)
class Choice:
    """A precision, and the measured time of float32 divided by that of bfloat16, if it was measured."""

    name: str
    speedup: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The PyTorch type of the precision."""
        return DTYPES[self.name]

    def figures(self) -> dict[str, Any]:
        """Return what a manifest records: `precision` and, if measured, `precision_speedup`."""
        return {"precision": self.name} | ({} if self.speedup is None else {"precision_speedup": self.speedup})


def choose(precision: str, device: torch.device, shapes: Shapes) -> Choice:
    """Return the precision to compute in: the one that is given or, for `auto`, the faster one.

    For `auto`: on CUDA bfloat16 if the GPU has it natively, otherwise float32 for training and float16 for inference;
    on a CPU with bfloat16 instructions the measured faster one; float32 on any other device.
    """
    if precision != "auto":
        return Choice(precision)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        choice = Choice("bfloat16" if native else "float32" if shapes.training else "float16")
        log.info("precision: %s (%s)", choice.name, torch.cuda.get_device_name(device))
        return choice
    if device.type != "cpu" or not has_bfloat16():
        log.info("precision: float32 (%s has no bfloat16 instructions)", device_name(device))
        return Choice("float32")
    speedup = round(node_speedup(shapes), 2)
    choice = Choice("bfloat16" if speedup >= MIN_SPEEDUP else "float32", speedup)
    compared = "" if choice.name == "bfloat16" else "bfloat16 is only " if speedup >= 1 else "bfloat16 is "
    log.info(
        "precision: %s (%s%.2g times as fast%s on %s, measured)",
        choice.name,
        compared,
        speedup,
        " as float32" if choice.name == "bfloat16" else "",
        device_name(device),
    )
    return choice


def allow_tf32(device: torch.device) -> None:
    """Let a GPU compute float32 matrix products in TensorFloat-32: 10 bits of mantissa, several times as fast.

    This has no effect on other devices.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def has_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def device_name(device: torch.device) -> str:
    """Return the processor's model for a CPU, otherwise the type of the device."""
    if device.type != "cpu":
        return device.type
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def node_speedup(shapes: Shapes) -> float:
    """Return the speedup of bfloat16 over float32 on this CPU, with the current number of threads.

    Measured once per node: the first process measures, and the others wait for its result.
    """
    sizes = "x".join(str(int(size)) for size in astuple(shapes))
    key = f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {torch.get_num_threads()} threads, {sizes}"
    return _node_speedup(key, shapes)


@functools.cache
def _node_speedup(key: str, shapes: Shapes) -> float:
    path = Path(tempfile.gettempdir()) / f"tiger-precision-{os.getuid()}.json"
    with _locked(path.with_suffix(".lock")):
        known = _read(path)
        if key not in known:
            known[key] = measure(shapes)
            _write(path, known)
    float32, bfloat16 = known[key]
    return float32 / bfloat16


def measure(shapes: Shapes) -> tuple[float, float]:
    """Time one transformer block of the given shapes on the CPU; return seconds in float32 and in bfloat16.

    The precisions alternate over several rounds, so that other processes slow down both equally; the minimum of each
    is returned. No random number generator is used.
    """
    width, hidden, inner = shapes.width, shapes.hidden, shapes.heads * shapes.head_dim
    passes = 3 if shapes.training else 1  # a backward pass takes two products for every product of the forward pass
    per_row = 2 * passes * (2 * width * hidden + 4 * width * inner)
    rows = min(shapes.rows, max(128, int(_OPERATIONS * torch.get_num_threads() / per_row)))
    sequences = max(1, rows // shapes.length)
    x = _values(sequences, shapes.length, width)
    sizes = [(hidden, width), (width, hidden), *([(3 * inner, width), (width, inner)] if inner else [])]
    weights = [_values(*size) * size[1] ** -0.5 for size in sizes]
    seconds: dict[torch.dtype, float] = {torch.float32: math.inf, torch.bfloat16: math.inf}
    steps = {dtype: _step(shapes, dtype, x, weights) for dtype in seconds}
    for step in steps.values():  # the first call of a kernel prepares it
        step()
    end = time.perf_counter() + _SECONDS
    for index in range(_ROUNDS):
        for dtype, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
        if index and time.perf_counter() > end:
            break
    return seconds[torch.float32], seconds[torch.bfloat16]


def _step(shapes: Shapes, dtype: torch.dtype, x: Tensor, weights: list[Tensor]) -> Any:
    """Return a function that computes the block once in `dtype`."""
    if shapes.training:
        inputs = [tensor.requires_grad_() for tensor in (x, *weights)]
        gradient = torch.ones_like(x)

        def train() -> None:
            with torch.enable_grad():
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    y = _block(shapes, inputs[0], inputs[1:])
                torch.autograd.grad(y, inputs, gradient)

        return train
    converted = [tensor.to(dtype) for tensor in (x, *weights)]

    def infer() -> None:
        with torch.inference_mode():
            _block(shapes, converted[0], converted[1:])

    return infer


def _block(shapes: Shapes, x_BSM: Tensor, weights: list[Tensor]) -> Tensor:
    """Self-attention, if the model has any, and a feed-forward layer, both with a residual connection."""
    up, down, *attention = weights
    if attention:
        query_key_value, out = attention
        packed = F.linear(x_BSM, query_key_value).unflatten(-1, (3, shapes.heads, shapes.head_dim))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        x_BSM = x_BSM + F.linear(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2), out)
    return x_BSM + F.linear(F.relu(F.linear(x_BSM, up)), down)


def _values(*shape: int) -> Tensor:
    """Return distinct deterministic numbers in [-1, 1]: sin(0), sin(1), ..."""
    return torch.arange(math.prod(shape), dtype=torch.float32).sin().view(shape)


def _open_own(path: Path, flags: int) -> int:
    """Open a regular file that belongs to this user; other users can write to the temporary directory.

    Raises:
        OSError: it cannot be opened, or it is a link, belongs to another user, or is not a regular file.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise PermissionError(f"{path} is not a file of this user")
    return descriptor


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on `path`; continue without it if the file cannot be opened or is locked for 30 seconds."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = _open_own(path, os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, descriptor)
            end = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        break
                    time.sleep(0.02)
        yield


def _read(path: Path) -> dict[str, tuple[float, float]]:
    """Return the times in the file; empty if it is missing, unreadable, another user's, or not written by `_write`."""
    try:
        with os.fdopen(_open_own(path, os.O_RDONLY), "rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
        known = {str(key): (float(float32), float(bfloat16)) for key, (float32, bfloat16) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    return {key: times for key, times in known.items() if all(0 < seconds < math.inf for seconds in times)}


def _write(path: Path, known: dict[str, tuple[float, float]]) -> None:
    """Replace the file atomically; if that fails, the next process measures again."""
    try:
        descriptor, partial = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(known, file)
        Path(partial).replace(path)  # os.replace: atomic
    except OSError:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
