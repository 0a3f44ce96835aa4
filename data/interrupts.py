"""Signals that end a command (Ctrl-C, SIGTERM, SIGHUP): at once, or after the step that is being computed."""
import contextlib
import os
import signal
import threading

CAUGHT = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAID = b"\nfinishing this step, then saving; once more: stop now\n"


class Interrupted(KeyboardInterrupt):
    """A signal ends the command; `code` is its exit code."""

    def __init__(self, number):
        super().__init__()
        self.code = 128 + number


class State:
    """What signals have done so far in this process. The class itself holds it; it has no instances."""
    noted = None                        # the signal that waits until a step is finished
    steps = 0                           # how many finishing() blocks are running, one within the other


def handle(number, frame):
    """Note the first signal within finishing(); any other raises Interrupted, so servers stop and files are closed."""
    if State.steps and State.noted is None:
        State.noted = number
        os.write(2, SAID)               # print() may have been interrupted itself
        return
    raise Interrupted(number)


@contextlib.contextmanager
def heard():
    """Within this with block, signals go to handle(). Those that this process ignores, as under nohup, stay ignored.
    Only the main thread can set handlers: in any other thread nothing is changed."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in CAUGHT if main}
    ours = {number: handler for number, handler in before.items()
            if handler in (signal.SIG_DFL, signal.default_int_handler)}
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if ours:
            State.noted, State.steps = None, 0


@contextlib.contextmanager
def finishing():
    """Within this with block the first signal is only noted, and the step is finished; a second one interrupts it."""
    State.steps += 1
    try:
        yield
    finally:
        State.steps = max(0, State.steps - 1)


def noted():
    """Whether a signal waits."""
    return State.noted is not None


def stop():
    """Raise Interrupted if a signal waits."""
    if noted():
        raise Interrupted(State.noted)
