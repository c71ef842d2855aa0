"""Runners: how a policy is asked so that nothing it does hurts the one who asks. Never acts on a plan.

A shipped policy runs in process. A file runs in a child process of its own, bounded in time and memory.
"""

from tiermem.runner.asking import Runner as Runner
from tiermem.runner.asking import open_runner as open_runner
from tiermem.runner.checking import check_file as check_file
