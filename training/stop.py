"""The signals that end a run early, at a step's end and in all processes alike."""

import signal

import torch
from accelerate import Accelerator


class StopSignal:
    """SIGTERM and Ctrl-C end the run after the step in hand; a second one ends it at once."""

    def __init__(self):
        self.received: str | None = None
        self.before = {each: signal.signal(each, self._receive) for each in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number, frame):
        self.received = signal.Signals(number).name
        self.restore()

    def restore(self):
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process was told to stop."""
        if accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor([int(self.received is not None)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())
