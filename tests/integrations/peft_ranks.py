"""What test_accelerate_ranks.py compares: `python peft_ranks.py FOLDER` on each rank that torchrun starts trains PEFT models
under DDP and FSDP2, plain and accelerated, and writes the losses and gradients."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import random_batches
from peft_twins import results, wrapped
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import plopfast as pf


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_by_layer(model):
    """Each LoRA layer by itself: no layer may compute with what another one gathers."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for name, module in model.named_modules():
        if name.endswith(("_proj", "norm")):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def main(folder):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    batch = random_batches(2)[rank]
    for wrap in (ddp, fsdp2, fsdp2_by_layer):
        for kind in ("plain", "fast"):
            model: nn.Module = wrapped()
            if kind == "fast":
                pf.accelerate(model)
            model = wrap(model)
            found = results(model, batch) | {f"again {name}": value for name, value in results(model, batch).items()}
            values = {name.removeprefix("module."): whole(value).contiguous() for name, value in found.items()}
            save_file(values, Path(folder) / f"{wrap.__name__}.{kind}.{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
