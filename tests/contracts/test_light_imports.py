"""What only some models need is imported by those alone."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_stable_diffusion_needs_no_taming_transformers():
    code = "import sys, ldm.models.diffusion.ddpm, main; print([name for name in sys.modules if name.startswith('taming')])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
