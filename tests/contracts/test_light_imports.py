"""What only some models need is imported by those alone."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_stable_diffusion_needs_no_taming_transformers():
    code = "import sys, main, ldm.models.diffusion.ddpm; print([name for name in sys.modules if 'taming' in name])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
