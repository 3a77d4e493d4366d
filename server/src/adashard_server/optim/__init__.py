"""The mathematics: what one parameter's weights and state become in one step.

Plain functions over bare tensors and numbers. What changes with time (beta2, rho, learning rates)
comes in as an argument, decided elsewhere; what a step did goes out as a value, told elsewhere.
So everything here can be read against the papers, and tested without a server.

May import torch and numpy; no gRPC, nothing of the wire, no clock, no lock.
"""
