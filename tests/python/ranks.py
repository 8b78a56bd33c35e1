# SPDX-License-Identifier: Apache-2.0
"""Functions in several processes that form one torch.distributed group."""

import os

import torch
import torch.distributed as dist


def on_ranks(function, num_ranks, folder, *args):
    """`function(rank, folder, *args)` in `num_ranks` processes, which meet and leave results in
    `folder`. Raises what the first of them raised.
    """
    torch.multiprocessing.spawn(_rank, (function, num_ranks, folder, args), nprocs=num_ranks)


def _rank(rank, function, num_ranks, folder, args):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    function(rank, folder, *args)
    dist.barrier()  # a rank that leaves early would close connections that others need
    dist.destroy_process_group()
    # Gloo's threads may still let go of tensors while the interpreter ends, and abort the process
    # then (pytorch/pytorch#179291, #190489); this test has seen it once. So it does not end.
    os._exit(os.EX_OK)
