"""The first of the processes computes a loss and saves it; the others wait for the file and call nothing.

torchrun --nproc_per_node 2 tests/lonely_worker.py FOLDER
"""

import datetime
import sys
import time
from pathlib import Path

import torch

from models import random_batch, tiny_captioner

PATIENCE = 120  # seconds


def main(folder: Path):
    patience = datetime.timedelta(seconds=PATIENCE)
    torch.distributed.init_process_group("gloo", timeout=patience)
    if torch.distributed.get_rank() == 0:
        captioner = tiny_captioner("routed")
        batch = random_batch(captioner.config)
        loss = captioner(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        torch.save(loss.detach(), folder / "partial.pt")
        (folder / "partial.pt").rename(folder / "loss.pt")
    started = time.monotonic()
    while not (folder / "loss.pt").exists():
        if time.monotonic() - started > PATIENCE:
            sys.exit("the other process never came to its loss")
        time.sleep(0.1)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
