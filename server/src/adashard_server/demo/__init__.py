"""The demo: a language model, trained from nothing through the service, on this machine.

`run_demo` starts a cluster and worker processes, watches them, and says at the end what came of
it. The workers are what a user's script would be: they know the client's public names and torch.

| file | says |
|---|---|
| `corpus.py` | what is read: source files of the standard library, and which are held out |
| `model.py` | what is trained: a small Transformer over bytes |
| `worker.py` | the training loop, one process each |
| `progress.py` | what a worker tells, a line of JSON at a time |
| `processes.py` | workers as processes: start, listen, stop |
| `figures.py` | what REST says about the job |
| `story.py` | what the workers have told, put together |
| `report.py` | what the terminal shows: a live line, and a table at the end |
| `chaos.py` | whom `--chaos` kills, and when |
| `events.py` | what the coordinator tells of it |
| `run.py` | all of it together |

May import: adashard's public names and errors, `cluster_local`, torch, httpx and rich.
"""
