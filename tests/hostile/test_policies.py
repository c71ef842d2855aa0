"""Policy files that do whatever a program can do: whoever asks them gets an error that says what, and lives on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import open_files, until
from tiermem.errors import ConfigError, PolicyError
from tiermem.policy import View
from tiermem.policy.sample import sample_request, sample_view
from tiermem.runner import Runner, check_file, open_runner

BUDGET_S = 0.3

Opener = Callable[[str], Runner]


@pytest.fixture
def view() -> View:
    return sample_view(300, 1)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens a file of this text; afterwards no process of it is left, and no descriptor."""
    runners, before, descriptors = [], open_files(), len(os.listdir("/proc/self/fd"))

    def open_text(text: str) -> Runner:
        (tmp_path / "mine.py").write_text(text)
        runners.append(open_runner(str(tmp_path / "mine.py"), BUDGET_S))
        return runners[-1]

    yield open_text
    for runner in runners:
        runner.close()
    until(lambda: not children_of(os.getpid(), "tiermem.runner.child"))
    assert open_files() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def children_of(parent: int | None, word: str) -> list[int]:
    """Processes with the word in their command line; of one parent, or of all."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, facts = (path / "cmdline").read_bytes(), (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if word.encode() in command and facts[0] != "Z" and parent in (None, int(facts[1])):
            found.append(int(path.name))
    return found


def planning(*lines: str, head: str = "") -> str:
    """A policy whose plan is these lines; the first of them is line 3, or later by the lines of `head`."""
    return f"{head}class Mine:\n    def plan(self, view):\n" + textwrap.indent("\n".join(lines), " " * 8) + "\n"


MOVES = "from tiermem.policy import Move\n"

FAILURES = {
    "raises": (planning("x = 1", "return 1 / 0"), r"plan\(view\) raised ZeroDivisionError: .* zero, in line 4"),
    "raises what has no text": (
        planning("raise Odd", head="class Odd(Exception):\n    def __str__(self): return 1 / 0\n"),
        "raised Odd: its text raises, too, in line 5",
    ),
    "raises no Exception": (planning("raise KeyboardInterrupt"), "raised KeyboardInterrupt, in line 3"),
    "recurses": (planning("return self.plan(view)"), "raised RecursionError: .*in line 3"),
    "sys.exit": (planning("import sys", "sys.exit(0)"), r"called sys.exit\(\), in line 4"),
    "os._exit": (planning("import os", "os._exit(3)"), r"ended its process with exit code 3"),
    "os.abort": (planning("import os", "os.abort()"), "ended its process by SIGABRT"),
    "segmentation fault": (planning("import ctypes", "ctypes.string_at(0)"), "ended its process by SIGSEGV"),
    "loops": (planning("while True:", "    pass"), r"took longer \(it is in line [34]\), 0.3 s are allowed"),
    "loops in C": (planning("x = 10", "return x ** 10 ** 9"), r"took longer \(it is in line 4\), 0.3 s are allowed"),
    "sleeps": (planning("import time", "time.sleep(9)"), r"took longer \(it is in line 4\)"),
    "ignores signals": (
        planning("import signal as s", "for n in range(1, 31):", "    if n not in (9, 10, 19): s.signal(n, s.SIG_IGN)",
                 "while True: pass"),
        "took longer",
    ),
    "asks for much memory": (planning("import numpy", "numpy.zeros(6 << 30, 'u1')"), r"raised \w*MemoryError"),
    "eats memory": (planning("x = []", "while True: x.append(bytes(1 << 26))"), "MemoryError|took longer"),
    "prints for ever": (planning("while True: print('x' * 100000)"), "took longer"),
    "forks for ever": (
        planning("import os", "for _ in range(6): os.fork()", "while True: pass"),
        "took longer",
    ),
    "forks and leaves": (planning("import os", "if os.fork(): os._exit(0)", "while True: pass"), "exit code 0"),
    "closes everything": (planning("import os", "os.closerange(0, 999)", "return []"), "closed its pipes|ended its"),
    "answers itself": (
        planning("import os", "for n in range(3, 200):", "    try: os.write(n, b'x' * 4096)",
                 "    except OSError: pass", "return []"),
        "its process answered nonsense",
    ),
    "huge answer": (planning("return [Move(0, 1, 0, 1, 'x')] * 10 ** 6", head=MOVES), "1000000 moves; 131072 may be"),
    "changes a column": (planning("view.pages.rate[:] = 0", "return []"), "read-only, in line 3"),
    "makes a column writable": (planning("view.pages.tier.flags.writeable = True"), "raised ValueError: .*in line 3"),
    "changes the view": (planning("view.tiers = ()", "return []"), "raised FrozenInstanceError: .*in line 3"),
    "no list": (planning("return None"), r"must return a list of moves, not NoneType"),
    "a generator": (planning("yield 1"), "a list of moves, not generator"),
    "no moves": (planning("return ['move', 7]"), r"move 0 of the plan, 'move': it is no tiermem.policy.Move"),
    "words for numbers": (planning("return [Move('0', 1, 0, 1, '')]", head=MOVES), "first must be a whole number"),
    "not a number": (planning("return [Move(float('nan'), 1, 0, 1, '')]", head=MOVES), "first must be a whole number"),
    "infinite numbers": (planning("return [Move(10 ** 30, 1, 0, 1, '')]", head=MOVES), "the view has rows 0 to 299"),
    "no reason": (planning("return [Move(0, 1, 0, 1, None)]", head=MOVES), "reason must be text"),
    "unknown pages": (planning("return [Move(299, 2, 0, 1, '')]", head=MOVES), "the view has rows 0 to 299"),
    "negative run": (planning("return [Move(5, -1, 0, 1, '')]", head=MOVES), "the view has rows 0 to 299"),
    "unknown tier": (planning("return [Move(0, 1, 0, 9, '')]", head=MOVES), "there is no tier 9"),
    "unknown kind": (planning("return [Move(0, 1, 0, 1, '', 'swap')]", head=MOVES), "kind must be move, copy or drop"),
    "loaded class lies": (
        planning("class Int(int):", "    def __index__(self): raise OSError('no')", "    __int__ = __index__",
                 "return [Move(Int(0), Int(10**9), 0, 1, '')]", head=MOVES),
        "the view has rows 0 to 299",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_policy_that_fails_is_named_with_what_it_did(opened: Opener, view: View, name: str) -> None:
    text, words = FAILURES[name]
    runner = opened(text)
    start = time.monotonic()
    with pytest.raises(PolicyError, match=words) as caught:
        runner.plan(view)
    assert time.monotonic() - start < BUDGET_S + 2
    assert runner.name in str(caught.value)
    assert len(str(caught.value)) < 6000
    with pytest.raises(PolicyError, match="answers no more"):
        runner.plan(view)
    assert opened(planning("return []")).plan(view) == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("np.flatnonzero(p.pinned)[:1], 1 - p.tier[p.pinned.argmax()]", "a page of it is pinned|moves nothing|tier"),
        ("np.flatnonzero((p.tier == 1) & ~p.pinned), 0", "has room for"),
        ("np.flatnonzero(p.leased & (p.tier < 2) & (p.tier >= 0) & ~p.pinned)[:1], 2", "leased"),
        ("np.flatnonzero(view.movable & ~p.leased)[:1], 2", "only whole segments"),
        ("np.flatnonzero(p.tier == 2)[:1], 0", "pages move between memory tiers"),
        ("np.flatnonzero(p.tier == 0)[:1], 0", "it moves nothing"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(opened: Opener, rows: str, words: str) -> None:
    head = "import numpy as np\nfrom tiermem.policy import moves\n"
    runner = opened(
        planning("p = view.pages", f"rows, to = {rows}", "return moves(view, rows, int(to), 'x')", head=head)
    )
    with pytest.raises(PolicyError, match=words):
        runner.plan(sample_view(3000, 1))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("None", "not NoneType"),
        ("[0]", r"shape \(1,\); 5 pages"),
        ("[[0, 1], [2]]", "array of tier ids"),
        ("np.zeros(5)", "float64; tier ids are whole numbers"),
        ("np.zeros((5, 1), np.int8)", r"shape \(5, 1\)"),
        ("['a'] * 5", "tier ids are whole numbers"),
        ("np.full(5, 2)", "names tier 2; the memory tiers are"),
        ("np.full(5, 256)", "names tier 256"),
        ("np.full(5, -2)", "names tier -2"),
        ("np.full(5, -1)", "leaves pages out"),
        ("1 / 0", r"place\(request\) raised ZeroDivisionError: .*in line 7"),
    ],
)
def test_a_place_that_cannot_be_is_refused(opened: Opener, answer: str, words: str) -> None:
    placing = f"    def place(self, request):\n        return {answer}\n"
    runner = opened("import numpy as np\n\n" + planning("return []").rstrip("\n") + "\n" + placing)
    with pytest.raises(PolicyError, match=words):
        runner.place(sample_request(5, sample_view(3000).tiers))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os\nos._exit(0)\n", "exit code 0"),
        ("import os\nos.abort()\n", "SIGABRT"),
        ("raise KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("import sys\n\nsys.exit(1)\n", r"called sys.exit\(\), in line 3"),
        ("class Mine:\n    def plan(self, view): return []\n    period_s = 10 ** 400\n", "period_s"),
        ("class Mine:\n    def plan(self, view): return []\n    @property\n    def guard_s(self): return 1 / 0\n",
         "ZeroDivisionError.*line 4"),
    ],
)  # fmt: skip
def test_a_file_that_fails_while_it_is_imported(opened: Opener, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        opened(text)


def test_an_import_that_never_ends_is_stopped(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.runner.asking.LOAD_S", 1.0)
    with pytest.raises(ConfigError, match=r"importing it took longer than 1 s \(it is in line 2\)"):
        opened("x = 1\nwhile True: pass\n")


def test_what_it_prints_goes_nowhere_near_the_answer(opened: Opener, view: View) -> None:
    lines = ("import os, sys", "print('x' * 3_000_000)", "os.write(1, b'tmPA' * 9)", "sys.stdin.read()", "return []")
    runner = opened(planning(*lines))
    assert [runner.plan(view) for _ in range(3)] == [[]] * 3


def test_its_last_words_are_passed_on(opened: Opener, view: View) -> None:
    runner = opened(planning("import os", "print('so long', flush=True)", "os._exit(1)"))
    with pytest.raises(PolicyError, match="it said: so long"):
        runner.plan(view)


def test_a_fork_that_comes_back_says_nothing(opened: Opener, view: View) -> None:
    runner = opened(planning("import os", "os.fork()", "return []"))
    assert [runner.plan(view) for _ in range(4)] == [[]] * 4


def test_what_it_started_ends_with_it(opened: Opener, view: View, tmp_path: Path) -> None:
    mark = f"sleep-{tmp_path.name}"
    line = f"subprocess.Popen(['bash', '-c', 'exec -a {mark} sleep 60'])"
    runner = opened(planning("import subprocess", line, "return []"))
    runner.plan(view)
    until(lambda: len(children_of(None, mark)) == 1)
    runner.close()
    until(lambda: not children_of(None, mark))


def test_it_has_no_descriptor_of_its_parent_and_dies_first(opened: Opener, view: View, tmp_path: Path) -> None:
    out = tmp_path / "facts.json"
    lines = (
        "import json, os, resource",
        "links = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')",
        "         if os.path.lexists(f'/proc/self/fd/{n}')]",
        "score = open('/proc/self/oom_score_adj').read()",
        "facts = links, score, resource.getrlimit(resource.RLIMIT_CORE), os.getsid(0) == os.getpid()",
        f"json.dump(facts, open({str(out)!r}, 'w'))",
        "return []",
    )
    with open(tmp_path / "secret", "w") as secret:
        os.set_inheritable(secret.fileno(), True)
        opened(planning(*lines)).plan(view)
    links, oom_score_adj, cores, leads = json.loads(out.read_text())
    assert not [link for link in links if "secret" in link]
    assert (oom_score_adj.strip(), cores, leads) == ("1000", [0, 0], True)


@pytest.mark.parametrize("line", ["time.sleep(60)", "10 ** 10 ** 9"])
def test_it_does_not_outlive_a_parent_that_is_killed(tmp_path: Path, line: str) -> None:
    """Not even in a call that never gives the interpreter back."""
    policy, begun = tmp_path / "orphan.py", tmp_path / "begun"
    policy.write_text(planning("import os, time", f"open({str(begun)!r}, 'w').write(str(os.getpid()))", line))
    program = f"""
from tiermem.policy.sample import sample_view
from tiermem.runner import open_runner
open_runner({str(policy)!r}, 60.0).plan(sample_view(10))
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2]) as parent:
        until(lambda: begun.exists() and begun.read_text() != "")
        parent.send_signal(signal.SIGKILL)
    child = Path("/proc") / begun.read_text()
    until(lambda: not child.exists() or " Z " in (child / "stat").read_text())


def test_no_program_to_run_it_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(planning("return []"))
    for executable in ("", str(tmp_path / "nothing")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ConfigError, match="in a process of its own"):
            open_runner(str(tmp_path / "mine.py"), BUDGET_S)


@pytest.mark.parametrize(
    ("text", "name", "line", "words"),
    [
        (planning("return []", "x = (")[:-1], "loads", 4, "SyntaxError"),
        (planning("while True: pass"), "plan: no pages", 3, "took longer than 2 s"),
        (planning("import os", "os.abort()"), "plan: no pages", None, "SIGABRT"),
        (planning("return view.pages.rate[0]"), "plan: no pages", 3, "IndexError"),
        (planning("import time", "time.sleep(0.15 if len(view.pages) == 777 else 0)", "return []"),
         "time for 777 pages", None, "0.1 s are allowed"),
        (planning("view.pages.rate.flags.writeable = True", "view.pages.rate[:1] = 7", "return []"), "plan: one page",
         None, "changed the view"),
        (planning("import random", "return [Move(0, 1, int(view.pages.tier[0]), 0, str(random.random()))]"
                  " if len(view.pages) == 1 and view.pages.tier[0] == 1 else []", head=MOVES),
         "equal views, equal plans", None, "plan: one page"),
    ],
)  # fmt: skip
def test_a_check_finds_what_is_wrong(tmp_path: Path, text: str, name: str, line: int | None, words: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    failed = next(check for check in check_file(str(path), 777, 2.0) if check.result == "failed")
    assert (failed.name, failed.line) == (name, line)
    assert words in failed.detail


def test_a_check_warns_of_imports_and_of_input(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(planning("import os", "os.listdir('/')", "return []", head="import socket\nimport numpy.linalg\n"))
    checks = list(check_file(str(path), 100))
    found = [(check.name, check.result, check.line) for check in checks if check.result != "ok"]
    assert found == [("imports", "warning", 1), ("imports", "warning", 5), ("no input or output", "warning", 6)]
