"""Python code in several processes that belong together, as `torchrun` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

START = """
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")  # of torch about its own collectives
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging
logging.disable_progress_bar()
from support.loaded import PROMPT, greedy
from wina_convert import load, set_sparsity

def logits(model):
    with torch.no_grad():
        return model(PROMPT.to(model.device)).logits

def apart(found, expected):
    return float((found - expected).abs().max())

def tell(found):
    with open(sys.argv[1] + f"/rank-{dist.get_rank()}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()

"""


def on_ranks(code: str, folder: Path, *args: object, ranks: int = 2, timeout: float = 280) -> list[Any]:
    """What each process gave to `tell`, by rank; arguments begin at `sys.argv[2]`.

    Args:
        code: what each process runs, behind START.
        folder: where to put code and results.
        args: further arguments.
        ranks: how many processes.
        timeout: seconds.
    """
    script = folder / "ranks.py"
    script.write_text(START + code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, str(script), str(folder), *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
