"""Convert a pickled checkpoint to safetensors in a process that can do little else.

``python -m tools.convert aesthetic_predictor_v2_5.pth FOLDER/head.safetensors`` starts a child with
an empty environment, limits on memory, files and time, and no network where Linux lets it be taken
away. The child reads with ``torch.load(weights_only=True)``, which builds tensors and runs no code
of the file; a file of anything else is refused. Nothing of the package ever opens a pickle.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEMORY, SECONDS = 64 * 2**30, 3600
CHILD = """
import ctypes, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # a user and a network of its own, if it may
import torch
from safetensors.torch import save_file
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
while isinstance(state, dict) and len(state) == 1 and isinstance(*state.values(), dict):
    state = next(iter(state.values()))
state = state.get("state_dict", state) if isinstance(state, dict) else state
if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
    sys.exit("it holds more than named tensors")
save_file({{str(k): v.clone().contiguous() for k, v in state.items()}}, sys.argv[2])
print(len(state), "tensors")
"""


def convert(source: Path, target: Path) -> str:
    """Write ``target`` from the pickle ``source``; return how many tensors it has.

    Raises:
        ValueError: the file is no pickle of tensors, or the target exists.
    """
    if target.suffix != ".safetensors" or target.exists():
        raise ValueError(f"{target} must be a new .safetensors file")
    if not source.is_file():
        raise ValueError(f"{source} is no file")
    target.parent.mkdir(parents=True, exist_ok=True)
    code = CHILD.format(memory=MEMORY, seconds=SECONDS)
    paths = [str(source.resolve()), str(target.resolve())]
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *paths],
        env={"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        target.unlink(missing_ok=True)
        reason = (done.stderr.strip().splitlines() or ["it was stopped"])[-1][:200]
        raise ValueError(f"{source} is no checkpoint of tensors alone ({reason}): nothing was run")
    return done.stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m tools.convert FILE.pth FILE.safetensors")
    try:
        print(convert(Path(sys.argv[1]), Path(sys.argv[2])))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
