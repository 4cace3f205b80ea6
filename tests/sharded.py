"""The command line with a strategy more: FSDP on a CPU, which Lightning's own name refuses."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry, fsdp
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig

from vrnn_lightning.cli import main


class Sharded(FSDPStrategy):
    def _setup_model(self, model):
        options = {"mixed_precision": self.mixed_precision_config, "sharding_strategy": self.sharding_strategy}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options, **self.kwargs)


def whole_state(module, world_size, rank0_only=True):
    """Lightning's also moves the state to the CPU, where it would be freed with what it was gathered in."""
    options = (FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False))
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *options)


fsdp._get_full_state_dict_context = whole_state
FSDPPrecision.forward_context = lambda self: torch.autocast("cpu", torch.bfloat16, "mixed" in self.precision)
StrategyRegistry.register("sharded", Sharded)


def run(words, environment, said):
    """Run a command in this process, which has imported everything already; what it says goes to a file."""
    os.environ.update(environment)
    with Path(said).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        torch.set_num_threads(1)
        code = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
