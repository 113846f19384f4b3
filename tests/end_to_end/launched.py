"""What test_processes.py runs in one process and in two: a step's gradients, training, evaluation.

Usage: launched.py FOLDER, for two processes. For every NAME.yaml it leaves NAME.safetensors (whole
gradients), NAME.json (measurements, and the pairs that each process read) and the run NAME.
A name that begins with fsdp is sharded by FSDP2.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

from inversion_dpo.evaluation.evaluate import evaluate
from inversion_dpo.run.config import load_config
from inversion_dpo.run.processes import current_team
from inversion_dpo.run.sharded import total, whole_tensors
from inversion_dpo.training import recipe as session_parts
from inversion_dpo.training import step as training
from inversion_dpo.training.recipe import train
from inversion_dpo.training.step import backward, heldout, losses
from inversion_dpo.trajectories import known
from tests.sessions import set_up

make_accelerator = session_parts.make_accelerator


def sharded(*arguments):
    """Accelerate takes FSDP only with GPUs; its FSDP2 code itself runs on CPUs and gloo."""
    accelerator = make_accelerator(*arguments)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def one_step(name, config, root):
    """Gradients and measurements of the first step."""
    seen, baselines = [], []

    def noted(session, batch, *rest, **more):
        found = losses(session, batch, *rest, **more)
        seen.extend(batch)
        baselines.append(float(found[1].baseline.mean()))
        return found

    session = set_up(config, root / f"cache-{name}")
    if config.policy.kind == "lora":  # at the reference margins and baselines are rounding alone
        for parameter in session.policy.trainable().values():
            parameter.data += 0.1
    training.losses = noted
    rows, _ = backward(session, 0)
    training.losses = losses
    gradients = whole_tensors({n: p.grad for n, p in session.policy.trainable().items()})
    team, device = session.team, session.accelerator.device
    facts = {
        "row": total(rows, device, team),
        "heldout": heldout(session),
        "seen": team.collect([seen]),
        "baselines": baselines,
        "type": type(session.network).__name__,
    }
    if team.main:
        save_file(gradients, root / f"{name}.safetensors")
        (root / f"{name}.json").write_text(json.dumps(facts))


def main(root):
    for file in sorted(root.glob("*.yaml"), key=lambda f: f.stem.startswith("fsdp")):
        if file.stem.startswith("fsdp") and current_team().size > 1:
            session_parts.make_accelerator = sharded
        config = load_config(str(file), [])
        with patch.object(known, "KNOWN_SHARE", 0.0):  # a random model knows no noise
            one_step(file.stem, config, root)
            train(config, root / file.stem, root / f"cache-{file.stem}")
        if file.stem == "ddp-kto":
            adapter = str(root / file.stem / "adapter")
            evaluate(root / file.stem, config, (None, adapter))


def main_of_two(root):
    """Run both processes; they share the imports, which cost seconds."""
    other = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if other else "1"
    main(root)
    if other and os.waitpid(other, 0)[1]:
        raise SystemExit("the second process failed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main_of_two(Path(sys.argv[1]))
