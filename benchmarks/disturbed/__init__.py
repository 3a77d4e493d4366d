"""A small training that can be disturbed at will, and must not show it in a bit of its weights.

| file | is |
|---|---|
| `trainee.py` | a worker process that trains what it is told to and says what came of it |
| `crew.py` | trainees as processes: started, heard, killed and replaced |
| `stage.py` | a cluster with fail points and a crew, and what is played on it |
| `cases.py` | every fault that is played, and what must come of it |

`faults.py` and `soak.py` beside this folder, and `tests/faults`, play with it.
"""
