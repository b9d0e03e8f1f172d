"""Runs pip install with little output: a line for each download of 10 MB or more, for the unpacking, and for errors.

    .venv/bin/python tiny/install.py -r requirements-dev.txt

pip runs in this process, so that a signal to the process also ends the installation.
"""

import io
import re
import runpy
import sys


class Brief(io.TextIOBase):
    """A stream that passes each complete line through `shown`, and prints the result unless it is empty."""

    def __init__(self, stream, shown):
        self.stream, self.shown, self.rest = stream, shown, ""

    def write(self, text):
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(None, map(self.shown, lines)):
            print(line, file=self.stream, flush=True)
        return len(text)


def progress(line: str) -> str:
    """The text to print for a line of pip's output; "" for none."""
    if download := re.search(r"Downloading (\S+) \(([\d.]+) ([MG])B\)", line):
        name, size, unit = download.groups()
        large = unit == "G" or float(size) >= 10
        return f"  downloading {'-'.join(name.split('-')[:2])} ({size} {unit}B)" if large else ""
    if line.startswith("Installing collected packages: "):
        return f"  unpacking {line.count(',') + 1} packages"
    return ""


def errors(line: str) -> str:
    return "" if line.startswith(("WARNING: ", "[notice]")) else line


if __name__ == "__main__":
    sys.stdout, sys.stderr = Brief(sys.stdout, progress), Brief(sys.stderr, errors)
    sys.argv[:] = ["pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *sys.argv[1:]]
    runpy.run_module("pip", run_name="__main__")
