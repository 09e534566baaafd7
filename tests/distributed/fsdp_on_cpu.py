"""`python -m flashmhf train` with --fsdp on the CPU, for a test.

accelerate has FSDP on accelerators alone: on the CPU it would train with DDP, so `flashmhf train` refuses the flag.
What accelerate does to a model and its optimizer works on a CPU, too; only its choice is changed here.
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from flashmhf.training import arguments as module

parse, initialise = module.parse_arguments, AcceleratorState.__init__


def with_fsdp(*given, **options):
    arguments = parse(*given, **options)
    arguments.fsdp = True
    arguments.fsdp_plugin_args = arguments._process_fsdp_args()
    return arguments


def choose_fsdp(self, *given, fsdp_plugin=None, **options):
    initialise(self, *given, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


module.parse_arguments, AcceleratorState.__init__ = with_fsdp, choose_fsdp
if __name__ == "__main__":
    del sys.argv[:2]  # this file, -m; runpy puts the module's file in place of its name
    runpy.run_module("flashmhf", run_name="__main__", alter_sys=True)
