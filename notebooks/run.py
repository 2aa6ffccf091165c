"""Run notebooks afresh and keep their text and PNG pictures, the same bytes every time: `python notebooks/run.py [--check | --gpu] NOTEBOOK...`

Outputs are committed, and made by this program only. --check writes nothing: it runs the notebooks and names the cells whose outputs are
no longer what the file holds (cells tagged nbval-ignore-output, which show times, aside). PNGs are compared too, which nbval does not do.
Prints run time and peak memory of each notebook.

It talks to the kernel itself: nbclient can wait for ever on cells that show widgets (jupyter/nbclient issue 312).
"""

import argparse
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

KEPT = ("text/plain", "text/markdown", "image/png")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CPU = {"CUDA_VISIBLE_DEVICES": ""}  # the environment of kernels that see no GPU: committed outputs are a CPU's
# of the kernel's process; macOS counts it in bytes, Linux in KiB
PEAK = "__import__('resource').getrusage(0).ru_maxrss / (2**20 if __import__('sys').platform == 'darwin' else 2**10)"


class CellFailed(Exception):
    """A cell raised an error, wrote a warning, or took too long."""


def messages(client: BlockingKernelClient, request: str, seconds: float) -> Iterator[dict[str, Any]]:
    """What the kernel publishes for a request, until it is idle again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            message = client.get_iopub_msg(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise CellFailed(f"took longer than {seconds:.0f} s") from None
        if message["parent_header"].get("msg_id") != request:
            continue
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return
        yield message


def run_cell(client: BlockingKernelClient, cell: Any, seconds: float) -> list[Any]:
    """The cell's outputs: text and PNG, neighbouring prints joined."""
    outputs: list[Any] = []
    for message in messages(client, client.execute(cell.source), seconds):
        kind, content = message["msg_type"], message["content"]
        if kind == "stream" and outputs and outputs[-1].output_type == "stream":
            outputs[-1].text += content["text"]
        elif kind in ("stream", "display_data", "execute_result", "error"):
            outputs.append(clean(nbformat.v4.output_from_msg(message)))
        if kind == "error" and "raises-exception" not in cell.metadata.get("tags", []):
            raise CellFailed(f"{content['ename']}: {content['evalue']}")
        if kind == "stream" and content["name"] == "stderr":
            raise CellFailed(f"wrote to stderr: {content['text']}")
    return outputs


def clean(output: Any) -> Any:
    """Without what only a live page can show, or what changes from run to run."""
    if "data" in output:
        output.data = {kind: value for kind, value in output.data.items() if kind in KEPT}
        output.metadata = {kind: value for kind, value in output.metadata.items() if kind in KEPT}
    if output.output_type == "error":
        output.traceback = []
    return output


def peak_memory(client: BlockingKernelClient) -> float:
    """The most memory that the kernel had so far, in MiB."""
    reply = client.execute_interactive("", silent=True, user_expressions={"peak": PEAK}, timeout=60)
    return float(reply["content"]["user_expressions"]["peak"]["data"]["text/plain"])


def run(notebook: Any, folder: Path, seconds: float, environment: dict[str, str]) -> float:
    """Fill in the outputs, in a new kernel that works in `folder`; returns its peak memory in MiB."""
    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(folder), stderr=subprocess.DEVNULL, env=os.environ | environment
    )
    try:
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for count, cell in enumerate(code, start=1):
            cell.execution_count = count
            try:
                cell.outputs = run_cell(client, cell, seconds)
            except CellFailed as failed:
                raise CellFailed(f"cell [{count}] {failed}\n{cell.source}") from None
        return peak_memory(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def strip(notebook: Any) -> None:
    """Drop the metadata that editors leave behind."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in ("tags", "nbgrader")}


def differences(before: Any, after: Any) -> list[str]:
    """The cells whose outputs differ, those that may differ aside."""
    return [
        f"cell [{new.execution_count}] shows something else:\n{new.source}"
        for old, new in zip(before.cells, after.cells, strict=True)
        if new.cell_type == "code" and "nbval-ignore-output" not in new.metadata.get("tags", [])
        and (old.outputs, old.execution_count) != (new.outputs, new.execution_count)
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="write nothing; fail if an output would change")
    only.add_argument("--gpu", action="store_true", help="write nothing; run on the GPU that there is, and fail if a cell does")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a cell may take")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.notebooks:
        notebook = nbformat.read(path, as_version=4)
        before, start = nbformat.read(path, as_version=4), time.monotonic()
        strip(notebook)
        try:
            peak = run(notebook, path.resolve().parent, arguments.timeout, {} if arguments.gpu else CPU)
        except CellFailed as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{path}: {time.monotonic() - start:.0f} s, at most {peak:.0f} MiB")
        if arguments.check:
            changed = differences(before, notebook)
            print(*(f"{path}: {line}" for line in changed), sep="\n", end="\n" if changed else "", file=sys.stderr)
            failed = failed or bool(changed)
        elif not arguments.gpu:
            nbformat.write(notebook, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
