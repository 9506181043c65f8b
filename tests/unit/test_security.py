"""Nothing that is read from storage runs code, and nothing in it leads out of its folder."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401  registers Arrow extension types, whose readers meet the files, too
import torch

from tests.paths import ROOT
from tiger.core.artifacts import Draft, build, open_artifact
from tiger.core.config import load
from tiger.core.errors import ArtifactError, ConfigError, SecurityError, TigerError
from tiger.core.storage import MANIFEST
from tiger.embedding.encoder import TextEncoder
from tiger.embedding.vectors import load_embeddings
from tiger.on_ray import cluster
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIds
from tiger.tokenizers.base import TokenizerConfig
from tiger.tokenizers.train import load_tokenizer
from tiger.training.checkpoints import CheckpointStore
from tiger.tuning import TuningConfig

SOURCES = sorted([*ROOT.glob("tiger/**/*.py"), *ROOT.glob("jobs/*.py")])

found_classes: list[str] = []
_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event == "pickle.find_class":
        found_classes.append(".".join(map(str, arguments)))


sys.addaudithook(_listen)  # cannot be taken away again, only told to be quiet


class Boom:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    global _listening
    found_classes.clear()
    _listening = True
    yield tmp_path / "ran"
    _listening = False
    assert not (tmp_path / "ran").exists()
    assert not found_classes


def payloads(marker: Path) -> dict[str, bytes]:
    """Files that would run code in a reader that trusts them."""
    boom = Boom(marker)

    def written(write: Any) -> bytes:
        write(target := io.BytesIO())
        return target.getvalue()

    def extension(name: str) -> pa.Table:
        metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": pickle.dumps(boom)}
        storage = pa.list_(pa.float32()) if "tensor" in name else pa.binary()
        value = [1.0] if "tensor" in name else pickle.dumps(boom)
        return pa.table([[value]], schema=pa.schema([pa.field("codes", storage, metadata=metadata)]))

    def archive(target: io.BytesIO) -> None:
        with zipfile.ZipFile(target, "w") as file:
            file.writestr("archive/data.pkl", pickle.dumps(boom))

    extensions = (
        "arrow_pickled_object",
        "ray.data.arrow_tensor",
        "ray.data.arrow_tensor_v2",
        "arrow.py_extension_type",
    )
    return {
        "pickle": pickle.dumps(boom),
        "old pickle": pickle.dumps(boom, protocol=0),
        "torch zip": written(lambda target: torch.save({"weight": boom}, target)),
        "torch legacy": written(
            lambda target: torch.save({"weight": boom}, target, _use_new_zipfile_serialization=False)
        ),
        "numpy objects": written(lambda target: np.save(target, np.array([boom], object), allow_pickle=True)),
        "numpy archive": written(lambda target: np.savez(target, x=np.array([boom], object))),
        "bare zip": written(archive),
        "JSON of an object": json.dumps({"py/object": "posix.system", "args": [f"touch {marker}"]}).encode(),
        "YAML": f"!!python/object/apply:os.system ['touch {marker}']".encode(),
        **{
            f"Parquet of {name}": written(lambda target, name=name: pq.write_table(extension(name), target))
            for name in extensions
        },
    }


PAYLOADS = sorted(payloads(Path("nowhere")))


def holding(root: Path, kind: str, name: str, content: bytes) -> str:
    """A whole artifact, its manifest in order, of one hostile file."""

    def make(draft: Draft) -> None:
        draft.folder.write_bytes(name, content)

    return build(str(root), kind, TuningConfig(), {}, make).folder.uri


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_files_run_nothing(payload: str, marker: Path, tmp_path: Path) -> None:
    content = payloads(marker)[payload]
    tokenizer = open_artifact(holding(tmp_path, "tokenizer", "model.safetensors", content)).folder
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load_tokenizer(TokenizerConfig.resolve({"num_levels": 2, "codebook_size": 4}), tokenizer, 8)
    readers = {"ids.parquet": SemanticIds.read, "vectors/part-00000.parquet": load_embeddings}
    for name, read in readers.items():
        with pytest.raises(TigerError):  # a Parquet file of other columns is read, and refused for them
            read(open_artifact(holding(tmp_path, name.partition(".")[0].replace("/", "_")[:7], name, content)).folder)
    (config := tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ConfigError):
        load(RunConfig, str(config), [], tmp_path)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_snapshots_run_nothing(payload: str, marker: Path, tmp_path: Path) -> None:
    content = payloads(marker)[payload]
    snapshots = CheckpointStore(
        open_folder := open_artifact(holding(tmp_path, "model", "x", b"")).folder.child("s"), {}
    )
    snapshots.save({"weight": torch.ones(2)}, {"step": 1})
    for name in ("tensors.safetensors", "state.json"):  # with a record that vouches for it
        own = open_folder.child("step-00000001")
        record, before = own.read_json("record.json"), own.read_bytes(name)
        own.write_bytes(name, content)
        own.write_json("record.json", record | {"sha256": {name: hashlib.sha256(content).hexdigest()}})
        with pytest.raises((TigerError, ValueError)):
            snapshots.load()
        own.write_bytes(name, before)


def test_a_text_encoder_brings_no_code_along(marker: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "hostile.py").write_text(f"open({str(marker)!r}, 'w')\nclass Boom: ...\n")
    (model / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "hostile.Boom"}]))
    with pytest.raises(Exception, match=r"hostile|cannot be loaded"):
        TextEncoder(str(model), device="cpu")


@pytest.mark.parametrize(
    "given",
    ["../../etc", "..", "/etc/passwd", "%2e%2e", "%252e%252e", "a\x00b", "..\\..", "0123456", "0123456789", "0123456G",
     "01234567/..", "01234567?x", "01234567#x", "", "s3://other/x", "~/x"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["catalog", "../catalog", "s3://catalog", ""])
def test_inputs_stand_beside_their_artifact(kind: str, given: str, tmp_path: Path) -> None:
    artifact = open_artifact(holding(tmp_path, "model", "x", b""))
    manifest = {key: value for key, value in artifact.manifest.items() if key != "digest"}
    manifest["inputs"] = {kind: given}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    artifact.folder.write_json(MANIFEST, manifest | {"digest": digest})
    with pytest.raises(SecurityError, match="is not the name of an artifact"):
        open_artifact(artifact.folder.uri)


@pytest.mark.parametrize("category", ["../../x", "Beauty/../../x", "Beauty?x=1", "a b", "", "Beauty#", "a\x00"])
def test_a_category_is_a_name_and_no_path(category: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.category"):
        load(RunConfig, None, ["data.kind=amazon", f"data.category={category!r}"], Path())


@pytest.mark.parametrize("name", cluster._UNSAFE)
def test_switches_that_let_data_run_code_are_refused(name: str) -> None:
    cluster.check_environment({name: "0"})
    with pytest.raises(SecurityError, match=name) as refusal:
        cluster.check_environment({name: "1"})
    assert refusal.value.exit_code == 8


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_source_loads_code_from_data(path: Path) -> None:
    """No eval, exec, pickle, unsafe yaml, shell, remote code; `ast.literal_eval` only where lines are capped."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not (isinstance(node, ast.ImportFrom) and node.module == "yaml"), "calls must name it"
            assert not {name.partition(".")[0] for name in names} & {"pickle", "cloudpickle", "joblib", "dill"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "os.system", "torch.load", "np.load"), ast.unparse(node)
            assert not {argument.arg for argument in node.keywords} & {"shell", "trust_remote_code", "allow_pickle"}
            assert not called.startswith("yaml.") or called in ("yaml.safe_dump", "yaml.safe_load")
            assert called != "ast.literal_eval" or path.parent.name == "readers"
