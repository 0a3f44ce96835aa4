"""A student's functions, called in a process of their own, so that nothing they do can change a grade.

A Student starts that process. Each call sends the arguments as JSON over a loopback port, and the result comes back in
the same way, as numbers: nothing that a student sends is executed. The student's code may print, hang, crash or exit.
The call then raises an AssertionError that says so, and the next call gets a new process.

This keeps honest mistakes and idle tricks away from the grade. It is no sandbox: the code runs with the rights of
whoever grades. Grade strangers in a container.
"""
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

START = 120.                            # seconds that a student's process may take to start
LIMIT = 60.                             # seconds that one function may take for all of its calls
LONGEST = 1 << 26                       # characters of a result
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)}


def environment():
    """The environment for a student's process: one thread, no passwords, no hub, nothing written beside its sources."""
    kept = {name: value for name, value in os.environ.items()
            if name != "PYTHONPATH" and not any(word in name.upper() for word in SECRET)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


# -- values as JSON ------------------------------------------------------------------------------------------------

def encode(x):
    """A value as what JSON can hold. Tuples become lists."""
    if isinstance(x, torch.Tensor):
        return {"tensor": x.flatten().tolist(), "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."),
                "learns": x.requires_grad}
    if isinstance(x, np.ndarray):
        return {"array": x.ravel().tolist(), "shape": list(x.shape), "dtype": x.dtype.name}
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, (list, tuple)):
        return [encode(each) for each in x]
    if isinstance(x, dict):
        return {"dict": {key: encode(value) for key, value in x.items()}}
    if isinstance(x, SimpleNamespace):
        return {"fields": encode(vars(x))}
    return x


def decode(x):
    """The value again. ValueError, TypeError, LookupError or RuntimeError if it is none."""
    if isinstance(x, list):
        return [decode(each) for each in x]
    if not isinstance(x, dict):
        return x
    if "tensor" in x:
        tensor = torch.tensor(x["tensor"], dtype=DTYPES[x["dtype"]]).view(x["shape"])
        return tensor.requires_grad_(x["learns"])
    if "array" in x:
        return np.array(x["array"], dtype=str(DTYPES[x["dtype"]]).removeprefix("torch.")).reshape(x["shape"])
    if "fields" in x:
        return SimpleNamespace(**decode(x["fields"]))
    return {key: decode(value) for key, value in x["dict"].items()}


# -- the grader's side ---------------------------------------------------------------------------------------------

class Student:
    """The functions of the project in a folder. To be used in a with block."""

    def __init__(self, folder):
        self.folder, self.process, self.connection, self.stream = Path(folder).resolve(), None, None, None
        self.taken = {}                 # {function: seconds}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()

    def start(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(START)
            line = [sys.executable, __file__, str(self.folder), str(server.getsockname()[1])]
            self.process = subprocess.Popen(line, cwd=self.folder, env=environment(), stdin=subprocess.DEVNULL,
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.connection, _ = server.accept()
        self.stream = self.connection.makefile("rw", encoding="utf-8")

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.connection.close()
        self.process = None

    def call(self, module, function, *args, **named):
        """What the student's function returns. AssertionError or NotImplementedError if it returns nothing usable."""
        left, late = LIMIT - self.taken.get(function, 0), f"{function}() takes more than {LIMIT:g} seconds"
        assert left > 0, late
        if not self.process:
            self.start()
        self.connection.settimeout(left)
        start = time.monotonic()
        try:
            request = {"module": module, "function": function, "args": encode(args), "named": encode(named)}
            self.stream.write(json.dumps(request) + "\n")
            self.stream.flush()
            reply = json.loads(self.stream.readline(LONGEST))
            error, blank, value = reply["error"], reply["blank"], decode(reply["value"])
        except TimeoutError:
            self.end()
            raise AssertionError(late) from None
        except (OSError, ValueError, TypeError, LookupError, RuntimeError, AttributeError):
            self.end()
            raise AssertionError(f"{function}() ends the process that calls it, or returns no numbers") from None
        finally:
            self.taken[function] = self.taken.get(function, 0) + time.monotonic() - start
        if blank:
            raise NotImplementedError(str(error))
        assert not error, f"{function}() raises {error}"
        return value


# -- the student's side --------------------------------------------------------------------------------------------

def reply_to(request):
    """What a call gives, as JSON can hold it; whatever the function raises is told, also that it wants to exit."""
    try:
        function = getattr(importlib.import_module(request["module"]), request["function"])
        value = function(*decode(request["args"]), **decode(request["named"]))
        return json.dumps({"error": "", "blank": False, "value": encode(value)})
    except NotImplementedError as error:
        return json.dumps({"error": str(error), "blank": True, "value": None})
    except BaseException as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}", "blank": False, "value": None})


def serve(folder, port):
    """Answer the calls of a Student until it hangs up."""
    sys.path[0] = folder                # not this file's folder, which is the grader's
    torch.set_num_threads(1)
    with socket.create_connection(("127.0.0.1", int(port))) as connection:
        stream = connection.makefile("rw", encoding="utf-8")
        for line in stream:
            stream.write(reply_to(json.loads(line)) + "\n")
            stream.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
