"""For pytest --nbval: kernels that see no GPU, and at the end the run time of each notebook and the most memory that its kernel had."""

import os
from collections import defaultdict
from typing import Any

import pytest
import run

seconds: dict[str, float] = defaultdict(float)
memory: dict[str, float] = {}


@pytest.hookimpl(tryfirst=True)  # before nbval starts the kernel
def pytest_runtest_setup(item: Any) -> None:
    os.environ |= run.CPU


def pytest_runtest_teardown(item: Any, nextitem: Any) -> None:
    last = nextitem is None or nextitem.parent is not item.parent
    if last and item.parent.kernel is not None and item.parent.kernel.is_alive():
        memory[item.location[0]] = run.peak_memory(item.parent.kernel.kc)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.location[0].endswith(".ipynb"):
        seconds[report.location[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for path, taken in seconds.items():
        terminalreporter.write_line(f"{path}: {taken:.0f} s, at most {memory.get(path, float('nan')):.0f} MiB")
