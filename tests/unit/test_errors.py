"""Errors that cross processes: as records, and pickled; and errors of Ray."""

from __future__ import annotations

import json
import pickle

import pytest

from tiger.core.errors import ConfigError, HealthError, ResourceError, TigerError
from tiger.core.storage import MissingError, StorageError
from tiger.on_ray import cluster


class CodebookError(HealthError):
    """An error of a plug-in, whose constructor takes what its message is made of."""

    def __init__(self, level: int, used: int) -> None:
        super().__init__(f"level {level} uses {used} codes")
        self.level, self.used = level, used


ERRORS = [ConfigError("a key"), StorageError("a disk"), MissingError("a file"), CodebookError(2, 7)]


def sent_as_json(error: TigerError) -> TigerError:
    return TigerError.from_record(json.loads(json.dumps(error.to_record())))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "send", [sent_as_json, lambda error: pickle.loads(pickle.dumps(error))], ids=["json", "pickle"]
)
def test_class_message_exit_code_and_attributes_arrive(send: object, error: TigerError) -> None:
    received = send(error)  # type: ignore[operator]
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert received.exit_code == error.exit_code
    assert vars(received) == vars(error)


def test_a_class_that_the_receiver_does_not_know_arrives_as_its_base() -> None:
    record = StorageError("a disk").to_record()
    record["kinds"] = ["BucketError", *record["kinds"]]
    assert type(TigerError.from_record(record)) is StorageError
    record["kinds"] = ["BucketError"]
    assert type(TigerError.from_record(record)) is TigerError


def test_an_error_that_ray_has_wrapped_arrives_as_its_class() -> None:
    from ray.exceptions import RayTaskError

    wrapped = RayTaskError("f", "Traceback ...", ResourceError("no memory"), ip="127.0.0.1").as_instanceof_cause()
    assert isinstance(wrapped, ResourceError)
    assert type(TigerError.from_record(wrapped.to_record())) is ResourceError
    assert type(pickle.loads(pickle.dumps(ResourceError("no memory")))) is ResourceError


def test_notes_arrive() -> None:
    error = HealthError("a loss")
    error.add_note("step 3")
    assert sent_as_json(error).__notes__ == ["step 3"]


def test_a_process_ended_for_memory_is_one_line_that_says_what_to_do() -> None:
    """The last line of Ray's message is a page of environment variables."""
    from ray.exceptions import OutOfMemoryError, RayError

    from tiger.on_ray.failures import to_tiger_error

    message = (
        "Task was killed due to the node running low on memory.\n"
        "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/. Set `RAY_x`."
    )
    found = str(to_tiger_error(OutOfMemoryError(message)))
    assert "running out of memory" in found and "use fewer workers" in found
    assert "RAY_x" not in found and "\n" not in found
    assert "worker 3 fell over" in str(to_tiger_error(RayError("Traceback\n worker 3 fell over")))


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because")  # as ray.init does

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(ResourceError, match=r"^a local Ray does not start \(The current node timed out during startup"):
        cluster._initialize("a local Ray does not start")
