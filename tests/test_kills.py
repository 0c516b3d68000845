"""`python -m tests.kills`, a little of it, so that it goes on to work."""

import re
import subprocess
import sys

from tests import helpers


def test_a_killed_plan_of_a_study_ends_undisturbed(tmp_path):
    command = [sys.executable, "-m", "tests.kills", "--commands=study plan"]
    command += ["--kinds=event", "--num=4", f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\| study plan \| 2 in (\d), \1 well \|", done.stdout)
    assert "0 faults" in done.stdout
