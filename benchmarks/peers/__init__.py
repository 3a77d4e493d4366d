"""What adashard is compared with: other parameter servers, and adashard itself, alike.

Each system has a module that is run as a process of its own, in the virtual environment of its
system, from the folder `benchmarks/`:

    python -m peers.tensorflow_ps TRAININGS.npz WEIGHTS.npz --servers 2
    python -m peers.torch_rpc RESULTS.json --steps 5 --optimizers torch ours

`peers_correctness.py` trains the same matrices on a given number of servers; `peers_speed.py` takes
steps of GPT-2 small with one and with two workers.

| file | says |
|---|---|
| `environments.py` | virtual environments: made, looked into, run in |
| `matrices.py` | what is trained, and its way from process to process; needs numpy alone |
| `measurement.py` | one system, trained on one server and on several, and the difference |
| `adashard_cluster.py` | adashard's shards |
| `tensorflow_ps.py` | TensorFlow's ParameterServerStrategy |
| `mxnet_kvstore.py` | MXNet's KVStore |
| `gpt2.py` | what is timed, and in which phases |
| `optimizers.py` | torch's Adafactor and our loops, behind any of the transports |
| `adashard_steps.py` | adashard: one shard and workers, over gRPC |
| `torch_rpc.py` | torch.distributed.rpc |
| `ray_actor.py` | an actor of Ray; `loopback.py` gives it a network of its own |
"""
