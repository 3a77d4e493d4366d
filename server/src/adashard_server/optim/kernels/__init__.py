"""The fast forms of the passes: the same equations as `optim/passes.py`, and held to it by tests.

May import numba and numpy, and nothing of ours.
"""
