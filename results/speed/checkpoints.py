"""Checkpoints of a full replay buffer: 950 000 new transitions at once, then 50 000 twice; and reading one."""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from rnm_td3_continuous import TD3, Args, Batch, Checkpoints, ReplayBuffer

for size in (256, 1024):
    low, high = np.full(6, -1, np.float32), np.full(6, 1, np.float32)  # HalfCheetah's sizes
    agent = TD3(17, low, high, Args(n=1, m=4, hidden_sizes=(size, size)), torch.device("cpu"))
    buffer, again = ReplayBuffer(1_000_000, 17, 6), ReplayBuffer(1_000_000, 17, 6)
    buffer.rows.normal_()
    batch = Batch(*(part.squeeze(1) for part in buffer.rows[:256].split(buffer.widths, dim=1)))
    agent.update_critics(batch)
    agent.update_actor(batch.obs)
    agent.project()  # now there is all that a checkpoint holds
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(Path(folder))
        for added in (950_000, 1_000_000, 1_050_000):
            buffer.added, buffer.size = added, min(added, 1_000_000)
            start = time.perf_counter()
            networks = {name: network.state_dict() for name, network in agent.networks.items()}
            optimizers = [agent.actor_optimizer.state_dict(), agent.q_optimizer.state_dict()]
            checkpoints.write(added, {"networks": networks, "optimizers": optimizers}, buffer)
            print(f"hidden size {size}, {added:9} transitions: written in {time.perf_counter() - start:.3f} s")
        start, reader = time.perf_counter(), Checkpoints(Path(folder))
        reader.read(reader.newest_first()[0], again)
        assert torch.equal(buffer.rows, again.rows)
        print(f"read and compared in {time.perf_counter() - start:.3f} s")
