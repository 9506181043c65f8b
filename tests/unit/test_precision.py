"""float32 or bfloat16: the faster one by measurement, measured once per node, and trusted to nobody else's files."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.paths import CONFIGS
from tiger.core import precision
from tiger.core.config import load
from tiger.core.precision import Choice, Shapes, allow_tf32, choose, measure, node_speedup
from tiger.models import sasrec
from tiger.run import RunConfig

CPU = torch.device("cpu")
SMALL = Shapes(rows=512, width=32, hidden=64, heads=2, head_dim=16, length=8)


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node on which nothing was measured yet, whose CPU has bfloat16 instructions; the path of its file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    precision._node_speedup.cache_clear()
    yield tmp_path / f"tiger-precision-{os.getuid()}.json"
    precision._node_speedup.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Shapes]:
    """Measurements that were made; bfloat16 is twice as fast."""
    made: list[Shapes] = []

    def fake(shapes: Shapes) -> tuple[float, float]:
        made.append(shapes)
        return 0.02, 0.01

    monkeypatch.setattr(precision, "measure", fake)
    return made


def restart() -> None:
    """As a new process of the same node."""
    precision._node_speedup.cache_clear()


@pytest.mark.parametrize(
    ("times", "expected", "line"),
    [
        ((1.83, 1.0), Choice("bfloat16", 1.83), "precision: bfloat16 (1.8 times as fast as float32 on "),
        ((1.14, 1.0), Choice("float32", 1.14), "precision: float32 (bfloat16 is only 1.1 times as fast on "),
        ((0.5, 1.0), Choice("float32", 0.5), "precision: float32 (bfloat16 is 0.5 times as fast on "),
        ((1.15, 1.0), Choice("bfloat16", 1.15), "precision: bfloat16 (1.1 times as fast as float32 on "),
    ],
)
def test_auto_is_the_faster_one(
    times: tuple[float, float],
    expected: Choice,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(precision, "measure", lambda shapes: times)
    with caplog.at_level(logging.INFO):
        assert choose("auto", CPU, SMALL) == expected
    (said,) = caplog.messages
    assert said.startswith(line)
    assert said.endswith(", measured)")
    assert expected.figures() == {"precision": expected.name, "precision_speedup": expected.speedup}


def test_nothing_is_measured_where_nothing_is_to_decide(
    measured: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose("bfloat16", CPU, SMALL) == Choice("bfloat16")
    assert choose("float32", CPU, SMALL).figures() == {"precision": "float32"}
    assert choose("auto", torch.device("meta"), SMALL) == Choice("float32")
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    assert choose("auto", CPU, SMALL) == Choice("float32")
    assert not measured


@pytest.mark.parametrize(("native", "training", "expected"), [
    (True, True, "bfloat16"), (True, False, "bfloat16"), (False, True, "float32"), (False, False, "float16"),
])  # fmt: skip
def test_on_cuda_the_hardware_decides(
    native: bool, training: bool, expected: str, measured: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert choose("auto", torch.device("cuda"), Shapes(1, 1, 1, training=training)) == Choice(expected)
    assert not measured


def test_tf32_is_for_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", given.append)
    allow_tf32(CPU)
    assert given == []
    allow_tf32(torch.device("cuda", 1))
    assert given == ["high"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("heads", [2, 0])
def test_a_measurement_is_short_and_draws_no_random_number(training: bool, heads: int) -> None:
    state, begin = torch.get_rng_state(), time.perf_counter()
    times = measure(Shapes(4096, 64, 256, heads, 32 if heads else 0, 20, training))
    assert time.perf_counter() - begin < 20  # 0.3 s on an idle core
    assert all(0 < seconds < math.inf for seconds in times)
    assert torch.equal(torch.get_rng_state(), state)


def test_shapes_of_a_module_are_those_of_its_largest_layer() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16))
    assert Shapes.of(module, 100, length=5, head_dim=8, training=False) == Shapes(100, 16, 64, 2, 8, 5, False)
    assert Shapes.of(nn.Embedding(3, 3), 100) == Shapes(100, 1, 1)


def test_a_node_measures_once(node: Path, measured: list[Shapes]) -> None:
    assert [node_speedup(SMALL) for _ in range(2)] == [2.0, 2.0]
    restart()
    assert node_speedup(SMALL) == 2.0
    assert measured == [SMALL]
    (key,) = json.loads(node.read_text())
    assert key.endswith(f", torch {torch.__version__}, {torch.get_num_threads()} threads, 512x32x64x2x16x8x1")
    assert node.stat().st_mode & 0o077 == 0
    other = Shapes(512, 32, 64, 2, 16, 8, training=False)
    node_speedup(other)
    assert measured == [SMALL, other]
    assert len(json.loads(node.read_text())) == 2


def test_processes_that_start_together_wait_for_one_measurement(
    measured: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand in for processes: each opens the lock file for itself, and none finds the process's cache."""
    fake = precision.measure

    def slow(shapes: Shapes) -> tuple[float, float]:
        time.sleep(0.3)
        return fake(shapes)

    monkeypatch.setattr(precision, "measure", slow)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: precision._node_speedup.__wrapped__("key", SMALL), range(8)))
    assert found == [2.0] * 8
    assert measured == [SMALL]


UNUSABLE = {
    "empty": b"", "torn": b'{"key": [1.0', "binary": b"\x80\x04\x95\xff", "a list": b"[1, 2]", "deep": b"[" * 100_000,
    "no pair": b'{"key": [1.0]}', "text": b'{"key": ["a", "b"]}', "negative": b'{"key": [-1.0, 1.0]}',
    "infinite": b'{"key": [Infinity, 1.0]}', "none": b'{"key": null}', "zero": b'{"key": [1.0, 0.0]}',
    "huge": b'{"key": [1' + b"0" * 400 + b", 1.0]}",
}  # fmt: skip


@pytest.mark.parametrize("content", UNUSABLE)
def test_an_unusable_file_is_replaced(content: str, node: Path, measured: list[Shapes]) -> None:
    node.write_bytes(UNUSABLE[content])
    assert precision._node_speedup("key", SMALL) == 2.0
    assert measured == [SMALL]
    assert json.loads(node.read_text()) == {"key": [0.02, 0.01]}


def test_a_file_of_another_user_is_not_read(
    node: Path, measured: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: uid)
    foreign = node.with_name(f"tiger-precision-{uid}.json")
    foreign.write_text('{"key": [9.0, 1.0]}')
    foreign.with_suffix(".lock").touch()
    assert precision._node_speedup("key", SMALL) == 2.0
    assert measured == [SMALL]


def test_a_link_is_neither_followed_nor_written_through(node: Path, measured: list[Shapes], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text('{"key": [9.0, 1.0]}')
    node.symlink_to(target)
    node.with_suffix(".lock").symlink_to(tmp_path / "made by nobody")
    assert precision._node_speedup("key", SMALL) == 2.0
    assert target.read_text() == '{"key": [9.0, 1.0]}'
    assert not (tmp_path / "made by nobody").exists()
    assert not node.is_symlink()


def test_a_pipe_does_not_block(node: Path, measured: list[Shapes]) -> None:
    os.mkfifo(node)
    os.mkfifo(node.with_suffix(".lock"))
    assert precision._node_speedup("key", SMALL) == 2.0


def test_a_folder_that_cannot_be_written_costs_the_file_only(
    measured: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no-such-folder")
    assert precision._node_speedup("key", SMALL) == 2.0


def test_a_lock_that_is_never_free_is_given_up(
    node: Path, measured: list[Shapes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_LOCK_SECONDS", 0.1)
    with precision._locked(node.with_suffix(".lock")):
        assert precision._node_speedup("key", SMALL) == 2.0


@pytest.mark.parametrize(("name", "expected"), [("sample", "float32"), ("beauty-cpu", "float32"), ("beauty", "auto")])
def test_presets_with_documented_figures_do_not_depend_on_the_processor(name: str, expected: str) -> None:
    run = load(RunConfig, name, [], CONFIGS)
    assert (run.embedding.precision, run.model.training.precision) == (expected, expected)
    assert (run.tokenizer.training.precision, sasrec.Config().training.precision) == ("float32", "float32")
