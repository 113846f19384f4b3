"""Are labels ever lost or doubled? Many clients label while the server is killed under them.

    python benchmarks/labels.py --labels 10000 --clients 8 --kills 20

Every client is a labeller who goes through all pairs over HTTP, as the page does: a label is sent
again, under the same request id, until the server has said that it is stored; some are sent once
more after that. The server is killed (SIGKILL) at even distances and started again. In the end
the file must hold exactly what was acknowledged. Everything stays on 127.0.0.1 and in a temporary
folder. Exit code 1 if a label is lost, doubled or wrong.

This shows what a dying process does. That a power cut does no more rests on SQLite's
``synchronous=FULL`` and on a disk that keeps what it has confirmed; that is not tried here.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

AGAIN = 0.05  # share of labels that are sent once more although they were acknowledged
CHOICES = ("left", "right", "tie", "bad")
PATIENCE = 60  # seconds that a client waits for a server


@dataclass
class Tally:
    """What all clients saw, under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    stored: dict[tuple[str, str], str] = field(default_factory=dict)  # (labeller, pair) -> meant
    resent: int = 0
    repeated: int = 0
    milliseconds: list[float] = field(default_factory=list)


def write_pairs(path: Path, count: int) -> None:
    """Pairs of 8x8 noise."""
    rng = np.random.default_rng(0)

    def png() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    rows = [{"jpg_0": png(), "jpg_1": png(), "caption": f"noise {k}"} for k in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path)


class Server:
    """``inversion-dpo web`` in a process of its own, on one port."""

    def __init__(self, data: Path, labels: Path, pairs: int) -> None:
        self.command = [
            sys.executable,
            "-m",
            "inversion_dpo",
            "web",
            str(data),
            "--labels",
            str(labels),
            "--limit",
            str(pairs),
            "--port",
        ]
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        command = [*self.command, str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout or ():
            if found := re.search(r"open http://127.0.0.1:(\d+)/", line):
                self.port = int(found[1])
                return
        raise SystemExit("the server did not start")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class Client:
    """One labeller."""

    def __init__(self, name: str, server: Server, tally: Tally) -> None:
        self.name, self.server, self.tally = name, server, tally
        self.rng = random.Random(name)
        self.connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request, repeated until it is answered."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                return self._once(method, path, body)
            except (OSError, http.client.HTTPException):
                self.connection = None
                with self.tally.lock:
                    self.tally.resent += method == "POST"
                time.sleep(0.05)
        raise SystemExit(f"{self.name}: no answer for {PATIENCE} s")

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        headers = {"content-type": "application/json"} if body else {}
        self.connection.request(method, path, json.dumps(body) if body else None, headers)
        response = self.connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise SystemExit(f"{self.name}: {response.status} {answer!r}")
        return json.loads(answer)

    def work(self) -> None:
        """Label all pairs."""
        state = self.ask("GET", f"/api/label/next?labeller={self.name}")
        while pair := state["pair"]:
            choice = self.rng.choice(CHOICES)
            sent = {
                "request": f"{self.rng.getrandbits(128):032x}",
                "labeller": self.name,
                "pair": pair["pair"],
                "choice": choice,
            }
            begun = time.monotonic()
            state = self.ask("POST", "/api/label/choose", sent)
            again = self.rng.random() < AGAIN
            with self.tally.lock:
                self.tally.stored[self.name, pair["pair"]] = pair.get(choice, choice)
                self.tally.milliseconds.append(1000 * (time.monotonic() - begun))
                self.tally.repeated += again
            if again:
                self.ask("POST", "/api/label/choose", sent)


def kill_at_even_distances(server: Server, tally: Tally, labels: int, kills: int) -> None:
    """Kill and restart the server between kills + 1 equal parts of the labels."""
    for k in range(1, kills + 1):
        while len(tally.stored) < labels * k // (kills + 1):
            time.sleep(0.001)
        server.kill()
        server.start()


def faults(labels: Path, stored: dict[tuple[str, str], str]) -> dict[str, int]:
    """Compare what the file holds with what was acknowledged."""
    query = (
        "SELECT labeller, pair, CASE choice WHEN 'first' THEN image_0 WHEN 'second' THEN image_1"
        " ELSE choice END FROM events JOIN pairs USING (pair)"
    )
    rows = sqlite3.connect(labels).execute(query).fetchall()
    found = {(labeller, pair): meant for labeller, pair, meant in rows}
    return {
        "events": len(rows),
        "lost": len(stored.keys() - found.keys()),
        "doubled": len(rows) - len(found),
        "never acknowledged": len(found.keys() - stored.keys()),
        "wrong": sum(found[key] != meant for key, meant in stored.items() if key in found),
    }


def main() -> None:
    """Run, print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--labels", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    asked = parser.parse_args()
    pairs, tally, begun = asked.labels // asked.clients, Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data, labels = Path(folder) / "pairs.parquet", Path(folder) / "labels.sqlite"
        write_pairs(data, pairs)
        server = Server(data, labels, pairs)
        clients = [Client(f"client-{k}", server, tally) for k in range(asked.clients)]
        threads = [threading.Thread(target=client.work, daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        kill_at_even_distances(server, tally, pairs * asked.clients, asked.kills)
        for thread in threads:
            thread.join()
        server.kill()
        found = faults(labels, tally.stored)
    middle, late = np.quantile(tally.milliseconds, [0.5, 0.99]) if tally.milliseconds else (0, 0)
    result = {
        "labels": len(tally.stored),
        "clients": asked.clients,
        "kills": asked.kills,
        **found,
        "attempts without an answer": tally.resent,
        "sent again though stored": tally.repeated,
        "milliseconds, median": round(float(middle), 1),
        "99%": round(float(late), 1),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(result))
    bad = found["lost"] or found["doubled"] or found["wrong"] or found["never acknowledged"]
    raise SystemExit(bool(bad) or found["events"] != pairs * asked.clients)


if __name__ == "__main__":
    main()
