"""Processes that are forks of one that has imported a test's module."""

import multiprocessing
from multiprocessing import forkserver


def server(module: str):
    """The context of a fork server that has imported a module.

    A running one, of other tests, imports nothing more: each of its forks would.
    """
    forkserver._forkserver._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
