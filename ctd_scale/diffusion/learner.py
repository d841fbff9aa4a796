"""A network in training: its weights, their average, which is published, and all that a killed loop goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ctd_scale import training
from ctd_scale.averaging import update_average
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser

STATE = "state.pt"


class Learner:
    """AdamW at a rate that falls by a cosine over `total_steps`, to a fiftieth; `step` of them are done."""

    def __init__(self, network: Denoiser, config: DiffusionConfig, total_steps: int) -> None:
        self.network, self.average = network, deepcopy(network)
        self.total_steps, self.step, self._decay = total_steps, 0, config.ema_decay
        rate = config.learning_rate
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=config.weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total_steps, eta_min=rate / 50)

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def resume(self, arguments: Mapping[str, Any], device: torch.device) -> None:
        """Go on from the loop's newest checkpoint, where there is one."""
        with training.latest_checkpoint(arguments) as folder:
            if folder is not None:
                state = torch.load(folder / STATE, map_location=device, weights_only=True)
                for name, part in self._parts.items():
                    part.load_state_dict(state[name])
                self.step = state["step"]

    def advance(self, loss: Float[Tensor, ""]) -> None:
        """One optimizer step down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        update_average(self.average.parameters(), self.network.parameters(), self._decay, self.step)

    def write(self, folder: Path, published: str) -> None:
        """A checkpoint; its export holds the averaged weights as the file `published`."""
        states = {name: part.state_dict() for name, part in self._parts.items()}
        torch.save({"step": self.step, **states}, folder / STATE)
        (folder / training.EXPORT).mkdir()
        save_file(self.average.state_dict(), folder / training.EXPORT / published)
