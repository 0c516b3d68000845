"""Ctrl-C and SIGTERM in processes of their own, without JAX."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from kdjax.runtime import interrupts

# A shell starts what runs in its background with Ctrl-C ignored.
HEAR_CTRL_C = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
"""
LOOP = """
import sys, time
from kdjax.runtime import interrupts

interrupts.install("train")
try:
    with interrupts.notice("the step is finished first"):
        with interrupts.StopRequest() as request:
            print("ready", flush=True)
            for step in range(1, 1000):
                time.sleep(0.05)
                if request.received and step > int(sys.argv[1]):
                    raise request.stop("saved")
except KeyboardInterrupt as error:
    print("train: interrupted:", error, file=sys.stderr)
    raise SystemExit(interrupts.SIGINT_CODE)
except interrupts.Terminated as error:
    print("train: ended:", error.message, file=sys.stderr)
    raise
"""
COMPUTE = """
import hashlib
from kdjax.runtime import interrupts

interrupts.install("train")
with interrupts.StopRequest():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # runs no handler, as a compiler
"""
PLAIN = """
import sys, time
from kdjax.runtime import interrupts

interrupts.install("label")
print("ready", flush=True)
time.sleep(60)
"""


def run(script: str, *signals: int, argument: int = 0) -> tuple[int, str]:
    """Starts a script, sends signals, returns its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAR_CTRL_C + script, str(argument)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        for number in signals[:1]:
            process.send_signal(number)
        for number in signals[1:]:
            threading.Event().wait(0.3)
            process.send_signal(number)
        text = process.stderr.read()
        return process.wait(10), text


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "train: interrupted: saved\n"),
        (signal.SIGTERM, 143, "train: ended: saved\n"),
    ],
)
def test_a_loop_ends_at_its_next_good_moment(number, code, line):
    assert run(LOOP, number) == (code, line)


def test_a_late_end_is_announced():
    code, text = run(LOOP, signal.SIGINT, argument=15)
    notice = "train: the step is finished first; Ctrl-C again: at once\n"
    assert (code, text) == (130, notice + "train: interrupted: saved\n")


def test_nothing_follows_the_last_line():
    """Ending may take longer than the notice waits for."""
    last = 'print("train: interrupted:", error, file=sys.stderr)\n'
    script = LOOP.replace(
        last, f"interrupts.silence()\n    {last}    time.sleep(1.5)\n"
    )
    assert run(script, signal.SIGINT) == (130, "train: interrupted: saved\n")
    # Without it the notice would come last.
    loud = script.replace("interrupts.silence()", "pass")
    assert run(loud, signal.SIGINT)[1].endswith("Ctrl-C again: at once\n")


@pytest.mark.parametrize("script", [LOOP, COMPUTE])
def test_a_second_ctrl_c_ends_at_once_whatever_the_main_thread_does(script):
    code, text = run(script, signal.SIGINT, signal.SIGINT, argument=999)
    ends = ("train: ended at once\n", "train: interrupted: \n")
    assert code == 130 and text.endswith(ends[: 2 if script == LOOP else 1])
    assert "Traceback" not in text


def test_elsewhere_signals_raise():
    code, text = run(PLAIN, signal.SIGTERM)
    assert code == 143 and text == ""  # the line is the command's
    code, text = run(PLAIN, signal.SIGINT)
    assert code == -signal.SIGINT and text.endswith("KeyboardInterrupt\n")


def test_handlers_are_those_of_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interrupts.StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.received == signal.SIGTERM
        assert isinstance(request.stop("saved"), interrupts.Terminated)
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == before


def test_what_ignores_ctrl_c_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a job in the background
    try:
        with interrupts.StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_does_nothing():
    errors = []

    def work():
        try:
            with interrupts.StopRequest():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
