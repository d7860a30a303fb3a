"""Another Flower than the supported ones is refused in a sentence."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flexlora.engines.flower.release import insist_on_flower

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("installed", ["1.41.0", "1.42.0", "1.42rc1", "1.42.1rc1"])
def test_supported_releases(installed):
    insist_on_flower(installed)


@pytest.mark.parametrize("installed", ["1.40.9", "1.43rc1", "1.43.0", "2.0.0", "0.41.0"])
def test_another_release_is_refused_with_the_range_of_the_extra(installed):
    with pytest.raises(ImportError, match=f"Flower {installed} is installed") as caught:
        insist_on_flower(installed)
    (wanted,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["flower"]
    assert wanted in str(caught.value)


def test_it_is_said_before_anything_of_flower_is_imported(tmp_path):
    """A future Flower without a single name that we know."""
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "__init__.py").write_text("raise RuntimeError('imported')")
    about = tmp_path / "flwr-9.9.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 9.9.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import flexlora.flower"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Flower 9.9.0 is installed; this flexlora works with" in done.stderr
