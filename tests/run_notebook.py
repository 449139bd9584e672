"Runs one notebook in a process that was forked for it, as the command nbdev-test does."

import os

from nbdev.test import nbdev_test


def run_notebook(notebook, log):
    "Save its outputs; what it says goes into a file, and a failure ends the process with 1."
    said = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.chdir(notebook.parent.parent)
    nbdev_test(str(notebook), save=True)
