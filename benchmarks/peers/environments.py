"""The environments of the peers: what each needs, and virtual environments made of that.

`PIP_ARGS` holds more arguments for pip, such as the index of PyTorch's CPU builds, which saves a download of some GB.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "python_of"]

_COMMON = ("torch==2.13.0", "transformers==5.23.0", "safetensors==0.8.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is installed.

    Attributes
    ----------
    packages : tuple of str
        With all that they require.
    bare : tuple of str
        Without what they require, as they ask for more than they use.
    """

    packages: tuple[str, ...] = _COMMON
    bare: tuple[str, ...] = ()


#: By module of this package. They exclude one another: SAELens wants an older TransformerLens.
ENVIRONMENTS = {
    "strap_llm": Environment(
        packages=(*_COMMON, "numpy", "lz4", "zstandard", "aiofiles"), bare=("llm-instrumentation==1.3.1",)
    ),
    "nnsight": Environment(packages=(*_COMMON, "nnsight==0.8.1")),
    "transformer_lens": Environment(packages=(*_COMMON, "transformer-lens==4.3.0")),
    "sae_lens": Environment(packages=(*_COMMON, "sae-lens==6.54.12")),
}


def python_of(name: str, directory: Path, *, is_made: bool) -> Path | None:
    """Return the interpreter of a peer's environment, making it first if it is missing and `is_made`.

    Raises
    ------
    subprocess.CalledProcessError
        If pip fails; its output is in the error.
    """
    place, wanted = directory / name, asdict(ENVIRONMENTS[name])
    python, stamp = place / "bin" / "python", place / "installed.json"
    if stamp.exists() and json.loads(stamp.read_text()) == json.loads(json.dumps(wanted)):
        return python
    if not is_made:
        return None
    print(f"making {place}", file=sys.stderr, flush=True)
    venv.create(place, with_pip=True, clear=True)
    _install(python, *ENVIRONMENTS[name].packages)
    if bare := ENVIRONMENTS[name].bare:
        _install(python, "--no-deps", *bare)
    stamp.write_text(json.dumps(wanted, indent=1) + "\n")
    return python


def _install(python: Path, *arguments: str) -> None:
    more = shlex.split(os.environ.get("PIP_ARGS", ""))
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *more,
        *arguments,
    ]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
