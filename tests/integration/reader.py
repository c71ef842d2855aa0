"""Reader: a client process that reads some layers of a model over and over, until it is told to do something else."""

from __future__ import annotations

from pathlib import Path

from tests.integration.child import Child

SCRIPT = """
import threading
import numpy as np
path, address, mode, *numbers = sys.argv[1:]
client = tiermem.connect(address)
model = client.open(path, writable=mode == "private")
arrays = [np.asarray(model[f"model.layers.{n}.weight"]) for n in numbers]
stop = threading.Event()
def read():
    while not stop.is_set():
        for array in arrays:
            array[::4096].sum()
        until = time.thread_time() + 0.001
        while time.thread_time() < until:
            pass
thread = threading.Thread(target=read, name="reading", daemon=True)
thread.start()
say("reading")
while (order := pause()) not in ("", "end"):
    if order == "close":
        stop.set()
        thread.join()
        arrays.clear()
        model.close()
    elif order == "pause_s":
        say(client._reporting.pause_s)
    elif order == "exec":
        os.execvp("sh", ["sh", "-c", "echo another program; exec sleep 60"])
stop.set()
thread.join()
"""


def reader(path: Path | str, address: str, *layers: int, writable: bool = False, uid: int | None = None) -> Child:
    """A process that has the model open and reads these layers. It takes the lines close, pause_s, exec and end."""
    child = Child.script(SCRIPT, path, address, "private" if writable else "shared", *layers, uid=uid)
    try:
        assert child.line() == "reading"
    except BaseException:
        child.__exit__()
        raise
    return child
