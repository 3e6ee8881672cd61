"""docs/performance.md and its picture are what bench/report.py makes of bench/results.json."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT


def test_the_page_and_its_picture_are_made_of_the_results(tmp_path: Path) -> None:
    """Guards against a figure that is changed, or a word that is mended, in the page alone."""
    subprocess.run([sys.executable, str(ROOT / "bench/report.py"), str(tmp_path)], check=True)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["performance.md", "performance.svg"]
    for name in made:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text()
