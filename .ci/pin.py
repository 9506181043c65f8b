"""Write the whole dependency resolution to pyproject.toml as `[tool.uv] constraint-dependencies`.

Run it to refresh the pins: `uv run --no-project python .ci/pin.py`. The resolution is universal: it holds for every
Python and platform that pyproject.toml admits. uv.lock would do the same, but it records package index addresses.
"""

import re
import subprocess
import tempfile
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
PINS = re.compile(r"(?ms)^constraint-dependencies = \[\n.*?^\]")


def main() -> None:
    """Resolve all dependencies without the old pins, and replace the pins."""
    text = PYPROJECT.read_text()
    with tempfile.TemporaryDirectory() as folder:  # resolve without the old pins
        unpinned = Path(folder) / "pyproject.toml"
        unpinned.write_text(PINS.sub("constraint-dependencies = [\n]", text))
        command = ["uv", "pip", "compile", str(unpinned), "--universal", "--all-extras", "--group", f"{unpinned}:dev"]
        command += ["--group", f"{unpinned}:docs"]
        command += ["--python-version", "3.11", "--no-annotate", "--no-header", "--quiet"]
        resolved = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line.strip().replace('"', "'") for line in resolved.splitlines() if "==" in line]
    pins = "constraint-dependencies = [\n" + "".join(f'    "{line}",\n' for line in lines) + "]"
    PYPROJECT.write_text(PINS.sub(lambda _: pins, text))
    print(f"{len(lines)} packages pinned in {PYPROJECT.name}")


if __name__ == "__main__":
    main()
