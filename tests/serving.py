"""What tests of the server send it: tokens, and bodies that it cannot answer."""

from __future__ import annotations

from pathlib import Path

UNREADABLE = {
    "NaN": b'{"history": ["a"], "k": NaN}',
    "infinity": b'{"history": ["a"], "k": 1e400}',
    "minus infinity": b'{"history": [-Infinity]}',
    "a lone surrogate": b'{"history": ["\\ud800"]}',
    "a lone surrogate as a user": b'{"history": ["a"], "user": "\\udfff"}',
    "a lone surrogate as a key": b'{"history": ["a"], "\\ud800": 1}',
    "an unknown key with NaN": b'{"history": ["a"], "x": NaN}',
    "an integer of 400 digits": b'{"history": ["a"], "k": ' + b"9" * 400 + b"}",
    "an integer of 4,000 digits": b'{"history": ["a"], "k": ' + b"9" * 4000 + b"}",
    "an integer of 6,000 digits": b'{"history": ["a"], "k": ' + b"9" * 6000 + b"}",
    "integers as names": b'{"history": [' + b"9" * 6000 + b"]}",
    "nothing but NaN": b"NaN",
    "a surrogate alone": b'"\\ud800"',
    "deep nesting": b"[" * 30_000,
    "a deep value": b'{"history": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "bytes that are not UTF-8": b'{"history": ["\xff\xfe"]}',
    "NUL": b'{"history": [1, "\\u0000"]}',
    "a long key": b'{"history": ["a"], "' + b"k" * 60_000 + b'": 1}',
    "many keys": b'{"history": ["a"], ' + b", ".join(b'"k%d": 1' % n for n in range(3000)) + b"}",
}


TOKEN = "a-token-of-the-test"


def token_file(folder: Path, content: str = TOKEN, mode: int = 0o600) -> str:
    path = folder / "token"
    path.write_text(content + "\n")
    path.chmod(mode)
    return str(path)
