"""Folders that tests read from."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tiger/configs"
SCRIPTS = ROOT / "tests/scripts"
"""Programs that tests run in processes of their own."""

BEAUTY = Path(os.environ.get("TIGER_BEAUTY", ROOT.parent / "shared/data/amazon-beauty"))
