"""What `peers_correctness.py` trains with: adashard and other parameter servers, alike.

Each system has a module that trains the same matrices on a given number of servers. It is run as a
process of its own, in the virtual environment of its system, from the folder `benchmarks/`:

    python -m peers.tensorflow_ps TRAININGS.npz WEIGHTS.npz --servers 2

| file | says |
|---|---|
| `matrices.py` | what is trained, and its way from process to process; needs numpy alone |
| `environments.py` | virtual environments: made, looked into, run in |
| `measurement.py` | one system, trained on one server and on several, and the difference |
| `adashard_cluster.py` | adashard's shards |
| `tensorflow_ps.py` | TensorFlow's ParameterServerStrategy |
| `mxnet_kvstore.py` | MXNet's KVStore |
"""
