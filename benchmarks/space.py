"""The Space under load: its first answer, single requests, and many clients at a time.

    python -m mome.benchmarks.space --clients 40 --seconds 120 --results evaluation/results.csv

`space/app.py` runs in a process of its own, with the checkpoint that it would find (`MOME_CHECKPOINT` names another).

- `start`: seconds from the command to the first answer to a search, everything installed, embeddings at hand;
- `single`: median milliseconds of one client's requests over plain HTTP, as a browser sends them, upload included.
  gradio_client looks for its answer every 50 ms, which would be most of what is measured;
- `load`: for so many seconds every client (of gradio_client) sends one request after the other, mostly searches.
  Median and 95th percentile of each endpoint; requests that failed; how much the server's memory grew in the second
  half.

Clients and server share the machine, so that the figures include what the clients cost.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gradio_client import Client, handle_file
from tqdm import tqdm

from ..evaluation.results import append_rows, environment

SPACE = Path(__file__).resolve().parent.parent / "space"
PICTURES = sorted((SPACE / "examples").glob("*.png"))
WORDS = "circus tent|hospital|an eye|laptop|microphone|musical note|arrow|a blue flower|house|pencil".split("|")
# How often a client asks each endpoint; searches by words and by pictures are told apart.
MIX = {"search": 6, "search by picture": 2, "classify": 2, "routing": 1, "caption": 1}
START_SECONDS = 600


class PlainClient:
    """The part of `gradio_client.Client` that the requests use, without waiting for more than the server.

    Args:
        url: of the Space.
    """

    def __init__(self, url: str):
        self.http = httpx.Client(base_url=url.rstrip("/") + "/gradio_api", timeout=120)

    def predict(self, *, api_name: str, **inputs: Any) -> str:
        """The answer as the server sends it, an event stream.

        Raises:
            RuntimeError: the endpoint refused.
        """
        body = {name: self._uploaded(value) for name, value in inputs.items()}
        event = self.http.post(f"/call/v2{api_name}", json=body).raise_for_status().json()["event_id"]
        answer = self.http.get(f"/call/v2{api_name}/{event}").raise_for_status().text
        if "event: complete" not in answer:
            raise RuntimeError(f"{api_name} answered {answer[:200]!r}")
        return answer

    def _uploaded(self, value: Any) -> Any:
        """The same with files of this machine replaced by uploads."""
        if isinstance(value, list):
            return [self._uploaded(each) for each in value]
        if not isinstance(value, dict):
            return value
        with open(value["path"], "rb") as file:
            (path,) = self.http.post("/upload", files={"files": file}).raise_for_status().json()
        return value | {"path": path}


Request = Callable[[Client | PlainClient, int], object]


def requests() -> dict[str, Request]:
    """Per kind of request a function of a client and a number, which varies it."""
    every = {"sets": [], "styles": [], "count": 24}

    def picture(number: int) -> dict:
        return handle_file(PICTURES[number % len(PICTURES)])

    return {
        "search": lambda client, n: client.predict(
            query=WORDS[n % len(WORDS)], image=None, **every, api_name="/search"
        ),
        "search by picture": lambda client, n: client.predict(query="", image=picture(n), **every, api_name="/search"),
        "classify": lambda client, n: client.predict(
            image=picture(n), labels="\n".join(WORDS), templates="{}", api_name="/classify"
        ),
        "routing": lambda client, n: client.predict(
            image=picture(n), caption=WORDS[n % len(WORDS)], api_name="/routing"
        ),
        "caption": lambda client, n: client.predict(images=[picture(n)], api_name="/caption"),
    }


@contextmanager
def running_space() -> Iterator[tuple[str, int, float]]:
    """The Space's address, its process and the time of its start; stopped at the end.

    Raises:
        RuntimeError: it stopped before it served, with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        start = time.perf_counter()
        with log.open("w") as file:
            settings = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": folder}
            command = [sys.executable, str(SPACE / "app.py")]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=settings)
        try:
            while "Running on local URL:" not in log.read_text():
                if process.poll() is not None or time.perf_counter() - start > START_SECONDS:
                    raise RuntimeError(f"the Space did not start:\n{log.read_text()}")
                time.sleep(0.05)
            url = log.read_text().split("Running on local URL:")[1].split()[0]
            yield url, process.pid, start
        finally:
            process.terminate()
            process.wait(60)


def resident_megabytes(pid: int) -> float:
    """Memory of a process that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_single(url: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of every kind of request."""
    client = PlainClient(url)
    medians = {}
    for kind, request in requests().items():
        request(client, 0)
        times = []
        for number in range(rounds):
            start = time.perf_counter()
            request(client, number)
            times.append((time.perf_counter() - start) * 1000)
        medians[kind] = statistics.median(times)
    return medians


class Load:
    """Clients that send one request after the other until the time is over.

    Attributes:
        times: per kind of request, milliseconds of each that was answered.
        failures: per kind, what those that weren't said.
    """

    def __init__(self, url: str, clients: int, seconds: float):
        self.url, self.clients, self.seconds = url, clients, seconds
        self.times: dict[str, list[float]] = defaultdict(list)
        self.failures: dict[str, list[str]] = defaultdict(list)
        self._turns = [kind for kind, count in MIX.items() for _ in range(count)]

    def run(self, pid: int) -> float:
        """Sends the load; returns by how many megabytes the server grew in the second half."""
        connected = threading.Barrier(self.clients + 1)
        threads = [
            threading.Thread(target=self._client, args=(number, connected), daemon=True)
            for number in range(self.clients)
        ]
        for thread in threads:
            thread.start()
        connected.wait()
        begin, middle = time.perf_counter(), None
        self.end = begin + self.seconds
        connected.wait()
        for _ in tqdm(range(int(self.seconds)), desc=f"{self.clients} clients", unit="s"):
            time.sleep(1)
            if middle is None and time.perf_counter() - begin >= self.seconds / 2:
                middle = resident_megabytes(pid)
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self.failures["client"].append("no answer for two minutes")
        return resident_megabytes(pid) - middle

    def _client(self, number: int, connected: threading.Barrier):
        client = Client(self.url, verbose=False, download_files=False)
        kinds, turn = requests(), number
        connected.wait()
        connected.wait()
        while time.perf_counter() < self.end:
            kind = self._turns[turn % len(self._turns)]
            start = time.perf_counter()
            try:
                kinds[kind](client, turn)
                self.times[kind].append((time.perf_counter() - start) * 1000)
            except Exception as error:  # of any kind: it is counted and told
                self.failures[kind].append(repr(error))
            turn += 5  # no common factor with the number of turns, so that every client takes all of them


def measure(clients: int, seconds: float, rounds: int) -> list[tuple[str, float]]:
    """Names and values of all figures."""
    with running_space() as (url, pid, start):
        requests()["search"](Client(url, verbose=False, download_files=False), 0)
        figures = [("Space, first answer, seconds", time.perf_counter() - start)]
        single = measure_single(url, rounds)
        figures += [(f"Space, {kind}, one client, p50 in ms", value) for kind, value in single.items()]
        load = Load(url, clients, seconds)
        growth = load.run(pid)
        figures.append((f"Space, {clients} clients, memory growth of the second half in MB", growth))
    for kind in MIX:
        if load.times[kind]:
            for name, share in (("p50", 50), ("p95", 95)):
                figures.append(
                    (f"Space, {kind}, {clients} clients, {name} in ms", float(np.percentile(load.times[kind], share)))
                )
    answered = sum(map(len, load.times.values()))
    failed = [message for messages in load.failures.values() for message in messages]
    figures.append((f"Space, {clients} clients, answers per second", answered / seconds))
    figures.append((f"Space, {clients} clients, failed requests", len(failed)))
    for message in sorted(set(failed))[:10]:
        print(f"failed: {message}", file=sys.stderr)
    return figures


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seconds", type=int, default=120, help="how long they all send requests")
    parser.add_argument("--rounds", type=int, default=20, help="single requests of each kind")
    parser.add_argument("--results", type=Path, help="append the rows to this CSV file")
    options = parser.parse_args(argv)
    if min(options.clients, options.rounds) < 1 or options.seconds < 2:
        parser.error("--clients and --rounds must be at least 1, --seconds at least 2")
    arguments = sys.argv[1:] if argv is None else argv
    shared = environment() | {"command": f"python -m mome.benchmarks.space {shlex.join(arguments)}".strip()}
    shared["data"] = (
        "gallery of 6,255 pictures; search by words and by pictures, classify, routing, caption as 6:2:2:1:1"
    )
    rows = []
    for metric, value in measure(options.clients, options.seconds, options.rounds):
        rows.append(shared | {"metric": metric, "value": f"{value:.4g}"})
        print(f"{metric}: {value:.4g}")
    if options.results:
        append_rows(options.results, rows)
    return rows


if __name__ == "__main__":
    main()
