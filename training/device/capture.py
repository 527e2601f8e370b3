"""A step as one recorded graph of kernels: the host starts the graph, not each of its thousands of kernels.

    numbers that change ─ Dials (on the device) ─┐
    rows of the batch ───────────────────────────┴─ Recorder ─ first steps of a shape: run as they are
                                                               then: recorded once, replayed (CUDA graph)

A recorded step reads its inputs where they were when it was recorded, so that all that changes lies in tensors that
stay in place: weights, the optimiser's state, learning rates, dials. Random numbers go on from replay to replay.
"""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import cuda

WARM_UPS = 3  # steps of a shape that run as they are: they make the optimiser's state, choose algorithms, fill caches


class Dials:
    """Numbers of a step, each a tensor () float32 on the device, that change from step to step.

    Attributes:
        strength: of drawing and sentences, in 0…1.
        caption_weight: of the caption loss.
        averaging: what the new weights count in the average of weights.
    """

    def __init__(self, device: torch.device):
        self.strength, self.caption_weight, self.averaging = torch.zeros(3, device=device).unbind()

    def turn(self, strength: float, caption_weight: float, averaging: float):
        """Sets them without a wait: the numbers travel with the kernels that write them."""
        self.strength.fill_(strength)
        self.caption_weight.fill_(caption_weight)
        self.averaging.fill_(averaging)


class Recorder:
    """Runs steps; on CUDA it records one after a few of the same shape, and replays it from then on.

    A step that can't be recorded goes on as it is, and is not recorded again.

    Args:
        device: of the steps.
        enabled: whether to record at all.
        say: told in a line why a step can't be recorded.
    """

    def __init__(self, device: torch.device, enabled: bool, say: Callable[[str], None] = print):
        self.device, self.enabled, self.say = device, enabled and device.type == "cuda", say
        self.shape: Hashable = None
        self.graph, self.inputs, self.outputs, self.seen = None, (), None, 0
        if self.enabled:
            self.stream = cuda.Stream(device)
            self.events = [cuda.Event(blocking=True) for _ in range(2)]

    def forget(self):
        """Frees what was recorded; the next step runs as it is. To be called when something moves in memory."""
        recorded = self.graph is not None
        self.shape, self.graph, self.inputs, self.outputs, self.seen = None, None, (), None, 0
        if recorded:
            cuda.synchronize(self.device)
            cuda.empty_cache()

    def __call__(self, shape: Hashable, step: Callable, *inputs: torch.Tensor):
        """What `step(*inputs)` gives; once it is recorded, in tensors that the next step overwrites.

        Args:
            shape: steps that do the same with tensors of the same shapes have the same one.
            step: reads nothing that changes but `inputs` and what stays in place on the device.
            inputs: tensors on the device.
        """
        if not self.enabled:
            return step(*inputs)
        if shape != self.shape:
            self.forget()
            self.shape = shape
        with self.on_stream():
            return self._run(step, inputs)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Inside, work is queued where steps are recorded: gradients that were first made elsewhere can't be."""
        if not self.enabled:
            yield
            return
        caller = cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)

    def _run(self, step: Callable, inputs: tuple[torch.Tensor, ...]):
        if self.graph is None and self.seen >= WARM_UPS:
            self._record(step, inputs)
        if self.graph is None:
            self.seen += 1
            return step(*inputs)
        for kept, given in zip(self.inputs, inputs):
            kept.copy_(given)
        # The host is two steps ahead at most: it keeps the time, by which the run is planned.
        event = self.events[self.seen % 2]
        event.synchronize()
        self.graph.replay()
        event.record()
        self.seen += 1
        return self.outputs

    def _record(self, step: Callable, inputs: tuple[torch.Tensor, ...]):
        self.inputs = tuple(each.clone() for each in inputs)
        graph = cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # what it frees meanwhile may be part of another graph
        try:
            with cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = step(*self.inputs)
            self.graph = graph
        except Exception as error:  # whatever it is: the run is worth more than its speed
            self.enabled, self.outputs = False, None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"the step can't be recorded and runs kernel by kernel: {reason}")
            # The generator still waits for the end of the recording: a copy of it doesn't.
            generator = cuda.default_generators[cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
        finally:
            gc.enable()
