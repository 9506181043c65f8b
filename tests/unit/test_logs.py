from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tiger.core.logs import JsonLinesHandler, redact


def test_secrets_are_in_no_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary/of+the+mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    handler = JsonLinesHandler(str(tmp_path), "embed")
    logger = logging.getLogger("tiger.test_logs")
    logger.addHandler(handler)
    logger.warning("reading s3://AKIACANARY:hush@bucket/x with canary/of+the+mine, %s", "token=0123456789abcdef")
    logger.error("ended", extra={"error": "password: swordfish; the rest"})
    logger.removeHandler(handler)
    (file,) = (tmp_path / "logs").iterdir()
    first, second = map(json.loads, file.read_text().splitlines())
    assert first["message"].startswith("reading s3://[redacted]@bucket/x with ")
    assert not any(
        word in file.read_text() for word in ("canary", "AKIACANARY", "hush", "0123456789abcdef", "swordfish")
    )
    assert second["error"] == "password: [redacted]; the rest"
    assert {"time", "level", "logger", "job", "message"} <= first.keys()
    assert (first["level"], first["job"]) == ("warning", "embed")


def test_what_is_no_secret_stays() -> None:
    text = "model: step 752, loss 6.279, 12,101 tokens; tokenizer: 3 levels; s3://bucket/runs/model-1a2b3c4d"
    assert redact(text) == text
