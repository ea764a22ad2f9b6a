"""`pip install .` into a fresh folder: models/ is the package recurrent_lm."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import sys
import torch
from recurrent_lm import QRNN, ForgetMult, RelationalMemory, recurrence
import recurrent_lm
assert "site-packages" in recurrent_lm.__file__, recurrent_lm.__file__
x = torch.randn(5, 3, 7, requires_grad=True)
output, hidden = QRNN(7, 11, 2)(x)
ForgetMult()(x.sigmoid(), x).sum().backward()
rmc = RelationalMemory(7, headsize=5, numheads=2)
memory = rmc(x, rmc.initial_state(3))[1]
print(tuple(output.shape), tuple(hidden.shape), tuple(memory.shape), tuple(recurrence(x, x).shape))
assert not {"models", "data", "utils"} & set(sys.modules)
"""


def test_pip_install(tmp_path):
    """The layers work from another folder, and no other package of this repository comes along."""
    copy = tmp_path / "source"  # setuptools builds in the folder it is given
    shutil.copytree(ROOT / "models", copy / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    packages = tmp_path / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", packages, copy], check=True, cwd=tmp_path)
    # torch and numba are this environment's: a second gigabyte would prove nothing more
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(5, 3, 11) (2, 3, 11) (1, 3, 10) (5, 3, 7)", done.stderr
    installed = {path.name for path in packages.iterdir()}
    assert (packages / "recurrent_lm" / "forget_mult" / "forget_mult.cu").is_file()
    assert "recurrent_lm" in installed and not {"models", "data", "utils", "tests"} & installed


def test_dependencies_are_those_that_are_tested():
    """What pyproject.toml asks for is pinned in requirements.txt, at its bound or above."""
    project, pins = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "requirements.txt"))
    asked = dict(re.findall(r'"(torch|numpy|numba)>=([\d.]+)"', project))
    pinned = dict(re.findall(r"^(torch|numpy|numba)==([\d.]+)", pins, re.MULTILINE))
    assert asked.keys() == pinned.keys() == {"torch", "numpy", "numba"}

    def key(version):
        return [int(part) for part in version.split(".")]

    assert all(key(pinned[name]) >= key(version) for name, version in asked.items())
