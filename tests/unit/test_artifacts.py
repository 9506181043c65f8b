from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
import safetensors.torch
import torch

from tiger.core import local_files
from tiger.core.artifacts import Artifact, Draft, build, newest, open_artifact
from tiger.core.config import Config
from tiger.core.errors import ArtifactError, ConfigError, ResourceError
from tiger.core.storage import SCRATCH, Folder, MissingError, StorageError


class Knobs(Config):
    size: int = 1


def fill(draft: Draft) -> None:
    draft.folder.write_table("table.parquet", pa.table({"x": [1, 2]}))
    draft.folder.write_json("more/notes.json", {"a": 1})
    draft.folder.write_json(f"{SCRATCH}/state.json", {})
    draft.metrics = {"rows": 2}


def made(root: Path, size: int = 1, inputs: dict[str, Artifact] | None = None, kind: str = "catalog") -> Artifact:
    return build(str(root), kind, Knobs(size=size), inputs or {}, fill)


def test_a_finished_stage_is_skipped_and_a_changed_one_is_not(tmp_path: Path) -> None:
    first = made(tmp_path)

    def never(draft: Draft) -> None:
        raise AssertionError("made twice")

    again = build(str(tmp_path), "catalog", Knobs(size=1), {}, never)
    assert again.manifest == first.manifest
    assert made(tmp_path, size=2).fingerprint != first.fingerprint
    assert set(first.manifest["files"]) == {"table.parquet", "more/notes.json"}
    assert not (Path(first.folder.uri) / SCRATCH).exists()


def test_fingerprints_do_not_depend_on_the_root_but_on_inputs(tmp_path: Path) -> None:
    here, there = made(tmp_path / "a"), made(tmp_path / "b")
    assert here.fingerprint == there.fingerprint
    child = made(tmp_path / "a", inputs={"catalog": here}, kind="embeddings")
    other = made(tmp_path / "a", inputs={"catalog": made(tmp_path / "a", size=2)}, kind="embeddings")
    assert child.fingerprint != other.fingerprint
    assert child.inputs["catalog"].folder.uri == here.folder.uri
    assert [part.kind for part in child.lineage()] == ["catalog", "embeddings"]


def test_a_stage_that_fails_leaves_nothing_to_read(tmp_path: Path) -> None:
    def fail(draft: Draft) -> None:
        fill(draft)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(str(tmp_path), "catalog", Knobs(), {}, fail)
    with pytest.raises(ArtifactError, match=r"is not a finished artifact; create it with `python -m jobs.prepare`"):
        open_artifact(str(next(tmp_path.glob("catalog-*"))))
    assert made(tmp_path).metrics == {"rows": 2}


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "add"])
def test_altered_files_are_named(damage: str, tmp_path: Path) -> None:
    artifact = made(tmp_path)
    path = Path(artifact.folder.uri) / "table.parquet"
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "remove":
        path.unlink()
    elif damage == "add":
        path.with_name("other-table.parquet").write_bytes(data)
    else:
        path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    for check in (artifact, None):
        with pytest.raises(ArtifactError, match=r"table.parquet"):
            (check or open_artifact(artifact.folder.uri)).verify()
    if damage != "flip":  # sizes are looked at on opening, contents by verify()
        with pytest.raises(ArtifactError, match=r"table.parquet"):
            made(tmp_path)


def test_a_manifest_of_another_time_or_kind_is_refused(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    with pytest.raises(ArtifactError, match="is a catalog artifact where model is needed"):
        open_artifact(artifact.folder.uri, expected_kind="model")
    path = Path(artifact.folder.uri) / "manifest.json"
    for version in (2, 99):
        path.write_text(json.dumps(artifact.manifest | {"schema_version": version}))
        with pytest.raises(
            ArtifactError, match=rf"another version .*\(schema {version}, here .\); run its stage again"
        ):
            open_artifact(artifact.folder.uri)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(artifact.folder.uri)


def test_newest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished model"):
        newest(str(tmp_path), "model")
    made(tmp_path)
    last = made(tmp_path, size=7)
    assert newest(str(tmp_path), "catalog").folder.uri == last.folder.uri


def test_parts_of_a_table_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for part in (2, 0, 1):
        folder.write_table(f"t/part-{part:05d}.parquet", pa.table({"x": [part]}))
    assert folder.read_table("t")["x"].to_pylist() == [0, 1, 2]


def test_two_runs_do_not_make_one_artifact_at_once(tmp_path: Path) -> None:
    """The second is told so, and once the first has ended it uses what that has left."""

    def meanwhile(draft: Draft) -> None:
        with pytest.raises(ResourceError, match="another run is making"):
            made(tmp_path)
        fill(draft)

    first = build(str(tmp_path), "catalog", Knobs(size=1), {}, meanwhile)
    assert made(tmp_path).manifest == first.manifest


def test_inputs_that_were_altered_are_not_built_on(tmp_path: Path) -> None:
    parent = made(tmp_path)
    path = Path(parent.folder.uri) / "more/notes.json"
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(ArtifactError, match=r"more/notes.json was altered"):
        made(tmp_path, inputs={"catalog": parent}, kind="embeddings")
    assert not list(tmp_path.glob("embeddings-*/manifest.json"))


def test_what_is_recorded_for_people_changes_no_fingerprint(tmp_path: Path) -> None:
    def build_with(**given: object) -> Artifact:
        return build(str(tmp_path), "catalog", Knobs(), {}, fill, **given)  # type: ignore[arg-type]

    one = build_with(source={"items/0": "a"}, record={"raw_files": [{"name": "x.csv"}]})
    assert build_with(source={"items/0": "a"}, record={"raw_files": [{"name": "y.csv"}]}).manifest == one.manifest
    assert build_with(source={"items/0": "b"}).fingerprint != one.fingerprint
    assert build_with(source={"items/1": "a"}).fingerprint != one.fingerprint
    assert one.manifest["raw_files"] == [{"name": "x.csv"}]


def test_what_is_read_by_content_is_recorded_verified_and_may_be_removed(tmp_path: Path) -> None:
    parents = [made(tmp_path, size=size) for size in (1, 2)]

    def child(parent: Artifact) -> Artifact:
        return build(
            str(tmp_path), "embeddings", Knobs(), {}, fill, source={"items": "a"}, read_from={"catalog": parent}
        )

    first = child(parents[0])
    assert child(parents[1]).folder.uri == first.folder.uri
    assert first.inputs["catalog"].fingerprint == parents[0].fingerprint
    model = build(str(tmp_path), "model", Knobs(), {"catalog": parents[1], "embeddings": first}, fill)
    assert [part.fingerprint for part in model.lineage()] == [
        parents[1].fingerprint, first.fingerprint, model.fingerprint,
    ]  # fmt: skip
    (Path(parents[0].folder.uri) / "manifest.json").unlink()
    again = open_artifact(first.folder.uri)
    assert again.inputs == {}
    assert [part.kind for part in again.lineage()] == ["embeddings"]


def test_what_is_read_by_content_is_verified_first(tmp_path: Path) -> None:
    parent = made(tmp_path)
    path = Path(parent.folder.uri) / "more/notes.json"
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(ArtifactError, match=r"more/notes.json was altered"):
        build(str(tmp_path), "embeddings", Knobs(), {}, fill, source={"items": "a"}, read_from={"catalog": parent})


def test_a_folder_without_parts_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors/note.txt").touch()
    with pytest.raises(ArtifactError, match=r"/vectors contains no Parquet file"):
        Folder(str(tmp_path)).read_table("vectors")


@pytest.mark.parametrize("uri", ["s3://bucket/runs?region=eu-west-1", "gs://bucket/runs?endpoint_override=x"])
def test_a_root_with_a_query_is_refused(uri: str) -> None:
    with pytest.raises(
        ConfigError, match=r"has no query; set the region with AWS_REGION and .* AWS_ENDPOINT_URL"
    ) as error:
        Folder(uri)
    assert "eu-west-1" not in str(error.value)  # a query may hold secrets


def test_a_local_folder_may_have_a_question_mark(tmp_path: Path) -> None:
    made(tmp_path / "what?").verify()


# --- errors of the storage --------------------------------------------------------------------------------------


def _refused(where: Path, message: str) -> None:
    with pytest.raises(StorageError, match=message) as error:
        made(where)
    assert "\n" not in str(error.value)


def test_a_root_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _refused(tmp_path / "file", r"/file/catalog-.*: .*; a component of this path is a file; remove it")
    _refused(tmp_path / "file/below", r"/file/below/catalog-.*: .*; a component of this path is a file; remove it")


def test_a_root_that_is_a_broken_link_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    _refused(tmp_path / "link", r"/link/catalog-.*: .*; |/link/catalog-.* does not exist.*; check .* symbolic links")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    _refused(tmp_path / "loop", r"/loop/catalog-.*: .*; ")


@pytest.mark.parametrize(("code", "fix"), [
    (errno.EACCES, "Permission denied; grant this user access to it"),
    (errno.EROFS, "Read-only file system; choose a folder on another disk"),
    (errno.EIO, "Input/output error; fix that, or choose another folder"),
    (errno.ENOSPC, "the disk is full"),
])  # fmt: skip
def test_what_a_disk_refuses_is_one_line(code: int, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected, because the super-user of a test machine is refused nothing."""

    def refuse(path: str, **_: object) -> None:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(local_files.os, "makedirs", refuse)
    _refused(tmp_path, rf"{tmp_path}/catalog-.*: {fix}")


@pytest.mark.skipif(os.geteuid() == 0, reason="the super-user may write everywhere")
def test_a_root_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    _refused(tmp_path / "closed", "Permission denied; grant this user access to it")


def test_a_disk_that_is_really_full_is_one_line(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"/log: the disk is full; free some of it, or set root to another disk"):
        folder.append_bytes("log", b"x")


def test_a_folder_instead_of_a_file_and_a_missing_file_are_one_line(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    (tmp_path / "folder").mkdir()
    for act in (lambda: folder.write_bytes("folder", b"x"), lambda: folder.read_bytes("folder"),
                lambda: folder.digest("folder"), lambda: folder.append_bytes("folder", b"x")):  # fmt: skip
        with pytest.raises(StorageError, match=r"/folder: [^\n]*; [^\n]*$"):
            act()
    for act in (lambda: folder.read_bytes("none"), lambda: folder.digest("none"), lambda: folder.read_table("none"),
                lambda: folder.read_json("none"), lambda: folder.child("b").copy_from(folder, "none")):  # fmt: skip
        with pytest.raises(MissingError, match=r"/none does not exist"):
            act()


@pytest.mark.parametrize("uri", ["nothing://x/y", "s3://", "gs://", "file://relative", "s3://Bad Bucket/x", "://x"])
def test_a_root_that_names_no_file_system_is_one_line(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]* cannot be opened: [^\n]*$"):
        Folder(uri)


def test_a_google_uri_is_opened_by_the_google_file_system() -> None:
    folder = Folder("gs://bucket/runs/").child("a")
    assert folder.filesystem.type_name == "gcs"
    assert (folder.uri, folder.path, folder.is_local) == ("gs://bucket/runs/a", "bucket/runs/a", False)


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Row n of the lists belongs to user n, also beyond 99,999 shards."""
    folder = Folder(str(tmp_path))
    for number in (100_000, 9, 99_999):
        folder.write_table(f"lists/part-{number:05d}.parquet", pa.table({"x": [number]}))
    assert folder.read_table("lists")["x"].to_pylist() == [9, 99_999, 100_000]


def test_tensors_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 4, generator=generator)
    tensors = {"b": matrix, "a/é": torch.arange(5), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 7)}
    floats, integers = ("float64", "bfloat16", "float16"), ("int32", "int16", "int8", "uint8", "bool")
    tensors |= {name: (matrix * 9).to(getattr(torch, name)) for name in floats + integers}
    tensors |= {"parameter": torch.nn.Parameter(matrix.clone()), "transposed": matrix.t()}
    folder = Folder(str(tmp_path))
    for own in (tensors, {}, {"b": matrix}):
        folder.write_tensors("x.safetensors", own)
        written = {name: tensor.detach().clone().contiguous() for name, tensor in own.items()}
        assert folder.read_bytes("x.safetensors") == safetensors.torch.save(written)
    (tmp_path / "one").write_bytes(b"abc")
    folder.write_bytes("pieces", [b"a", memoryview(b"bc")])
    assert folder.read_bytes("pieces") == b"abc"
