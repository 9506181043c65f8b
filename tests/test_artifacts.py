from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tiger.artifacts import SCRATCH, Artifact, Draft, Folder, build, newest, open_artifact
from tiger.config import Config
from tiger.errors import ArtifactError, ResourceError


class Knobs(Config):
    size: int = 1


def fill(draft: Draft) -> None:
    draft.folder.write_table("table.parquet", pa.table({"x": [1, 2]}))
    draft.folder.write_json("more/notes.json", {"a": 1})
    draft.folder.write_json(f"{SCRATCH}/state.json", {})
    draft.figures = {"rows": 2}


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
    with pytest.raises(ArtifactError, match=r"holds no finished artifact; `python -m jobs.prepare` makes it"):
        open_artifact(str(next(tmp_path.glob("catalog-*"))))
    assert made(tmp_path).figures == {"rows": 2}


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_altered_files_are_named(damage: str, tmp_path: Path) -> None:
    artifact = made(tmp_path)
    path = Path(artifact.folder.uri) / "table.parquet"
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    with pytest.raises(ArtifactError, match=r"table.parquet"):
        open_artifact(artifact.folder.uri).verify()
    if damage != "flip":  # sizes are looked at on opening, contents by verify()
        with pytest.raises(ArtifactError, match=r"table.parquet"):
            made(tmp_path)


def test_a_manifest_of_another_time_or_kind_is_refused(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    with pytest.raises(ArtifactError, match="is a catalog artifact where model is needed"):
        open_artifact(artifact.folder.uri, expected_kind="model")
    path = Path(artifact.folder.uri) / "manifest.json"
    path.write_text(json.dumps(artifact.manifest | {"schema_version": 99}))
    with pytest.raises(ArtifactError, match="another version"):
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
